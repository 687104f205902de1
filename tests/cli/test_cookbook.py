"""docs/cookbook.md: its commands are understood, its images are there, and it can be generated again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from sdcli.cli.app import app
from tests.conftest import REPOSITORY
from tests.forked import run_forked

SCRIPT = REPOSITORY / "scripts" / "make_cookbook.py"
FOLDER = REPOSITORY / "docs" / "cookbook"
_spec = importlib.util.spec_from_file_location("make_cookbook", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
cookbook = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cookbook)


def test_every_image_of_the_page_is_there() -> None:
    assert [name for name in cookbook.images() if not (FOLDER / name).is_file()] == []


def test_every_generate_command_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    commands = typer.main.get_command(app)
    asked = [command for command in cookbook.commands() if command[:2] == ["sdcli", "generate"]]
    assert asked
    for _, *arguments in asked:
        for option in {"--trace", "--heatmap", "--preview"} & set(arguments):  # a dry run refuses these
            place = arguments.index(option)
            del arguments[place : place + 2]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            commands.main([*arguments, "--dry-run", "--json"], standalone_mode=False)
        assert printed.getvalue()


@pytest.mark.slow
def test_the_whole_page_is_painted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
        """`python -m sdcli …` without the seconds of its imports."""
        assert command[:3] == [sys.executable, "-m", "sdcli"]
        done = run_forked(command[3:], cwd=cwd, timeout=240)
        assert done.returncode == 0, done.stderr
        return done

    monkeypatch.setattr(cookbook, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "again")])
    cookbook.main()
    shown = {path.name for path in FOLDER.rglob("*.png")}
    assert shown
    assert {path.name for path in (tmp_path / "again").rglob("*.png")} == shown
