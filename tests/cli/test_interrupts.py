"""Ctrl-C ends a command wherever it arrives: no `except` of the project takes it for a failure of one item."""

from __future__ import annotations

import ast
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdcli.cli.app import main
from sdcli.errors import Interrupted, SdcliError

SOURCES = sorted((Path(__file__).parents[2] / "sdcli").rglob("*.py"))
MAY_CATCH = {"main", "_prepare"}
"""`main` ends the process; the feed's `_prepare` runs in a thread, where Python delivers no signal, and passes every
error on to the main thread."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers that `main` installs are replaced again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopping(number: signal.Signals, function: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    """The function, with a signal that arrives during its first call."""
    calls: list[object] = []

    def stop(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            signal.raise_signal(number)
        return function(*arguments, **options)

    return stop


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sdcli", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_stop_request_is_no_error() -> None:
    assert not issubclass(Interrupted, Exception)
    assert not issubclass(SdcliError, Interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "option", [["--lora", "style.safetensors"], ["--init-image", "start.png"], ["--embedding", "word.safetensors"]]
)
def test_a_signal_while_a_file_is_hashed_ends_generate_and_reports_no_bad_job(
    option: list[str],
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(option[1]).write_bytes(b"x" * 100)
    monkeypatch.setattr("hashlib.file_digest", stopping(number, hashlib.file_digest))
    assert run(monkeypatch, "generate", "a fox", "a cat", "-m", "starter", "--dry-run", *option) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"sdcli: {'interrupted' if code == 130 else 'terminated'}\n"


@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        (["info", "a.png", "b.png"], "PIL.Image.open"),
        (["models", "verify", "starter", "sd15"], "sdcli.models.hub.manifest.verify"),
        (["compare", "a.png", "b.png"], "PIL.Image.open"),
        (["selftest", "--device", "cpu"], "sdcli.generation.selftest._Trial.generate"),
    ],
)
def test_a_signal_during_one_item_is_no_failure_of_that_item(
    arguments: list[str],
    function: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(function, stopping(signal.SIGINT))
    assert run(monkeypatch, *arguments) == 130
    assert capsys.readouterr().err == "sdcli: interrupted\n"


def test_no_handler_catches_everything_without_raising_it_again() -> None:
    """Also no `suppress(BaseException)`, and no `finally` that ends an exception by leaving the block."""
    assert SOURCES
    wrong = [f"{path.name}:{line}" for path in SOURCES for line in swallowing(ast.parse(path.read_text()))]
    assert not wrong, f"these can swallow Ctrl-C: {wrong}"


def test_the_search_for_swallowing_handlers_finds_them() -> None:
    for block in ("except BaseException: pass", "except: pass", "except (OSError, Interrupted): x()"):
        assert list(swallowing(ast.parse(f"try:\n  x()\n{block}")))
    assert list(swallowing(ast.parse("def f():\n  try:\n    x()\n  finally:\n    return 1")))
    assert list(swallowing(ast.parse("with contextlib.suppress(BaseException):\n  x()")))
    assert not list(swallowing(ast.parse("try:\n  x()\nexcept BaseException:\n  y()\n  raise")))
    assert not list(swallowing(ast.parse("try:\n  x()\nexcept Exception: pass")))


def swallowing(tree: ast.AST, *, function: str = "") -> Iterator[int]:
    """The lines at which an exception that is no Exception could end."""
    for node in ast.iter_child_nodes(tree):
        within = node.name if isinstance(node, ast.FunctionDef) else function
        match node:
            case ast.ExceptHandler(type=kind, body=body) if kind is None or everything(kind):
                if not isinstance(body[-1], ast.Raise) and within not in MAY_CATCH:
                    yield node.lineno
            case ast.Try(finalbody=[*body]):
                left = [
                    n for one in body for n in ast.walk(one) if isinstance(n, ast.Return | ast.Break | ast.Continue)
                ]
                yield from (one.lineno for one in left)
            case ast.Call(func=ast.Attribute(attr="suppress") | ast.Name(id="suppress")):
                yield from (node.lineno for one in node.args if everything(one))
        yield from swallowing(node, function=within)


def everything(kind: ast.expr) -> bool:
    names = {node.id for node in ast.walk(kind) if isinstance(node, ast.Name)}
    return bool(names & {"BaseException", "Interrupted", "Terminated"})
