"""Streams of every command: closed ones, full disks, readers that leave, and encodings without the letters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sdcli.cli.app import COMMANDS
from sdcli.cli.ui import console
from sdcli.cli.ui.console import Console, printable, readable_json
from sdcli.cli.ui.streams import ReaderGone, _StderrBytes, _StdinBytes, _StdoutBytes
from sdcli.errors import BadImage, CannotWrite
from tests.conftest import REPOSITORY, Run
from tests.forked import run_forked_raw

TINY = ["-m", "tiny", "--seed", "1", "--steps", "1", "-q"]
CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]
SEVERAL = ["<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMAND_LINES = [["--help"], ["generate", "--help"]]


def shell(line: str, where: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell's command line in which `sdcli` is this one, in a new interpreter."""
    script = f'sdcli() {{ "{sys.executable}" -m sdcli "$@"; }}\n{line}'
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(["bash", "-c", script], cwd=where, env=env, capture_output=True, timeout=240)


def is_clean(text: bytes) -> bool:
    return not any(word in text for word in (b"Traceback", b"unexpected", b"Exception ignored", b"lost sys."))


def sheet_of(where: Path) -> list[str]:
    return sorted(path.name for path in (where / "outputs").glob("*.png"))


# Every command, with streams as a shell makes them


@pytest.mark.slow
@pytest.mark.parametrize("streams", [*CLOSED, ">/dev/full", "2>/dev/full"])
@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_help_works_with_any_streams(arguments: list[str], streams: str, tmp_path: Path) -> None:
    help_works(arguments, streams, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("streams", SEVERAL)
@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_works_with_any_streams(name: str, streams: str, tmp_path: Path) -> None:
    code, _, err = run_forked_raw([name, "--help"], cwd=tmp_path, streams=streams)
    assert code == (8 if streams.startswith(">/dev/full") else 0)
    assert is_clean(err)


def help_works(arguments: list[str], streams: str, where: Path) -> None:
    done = shell(f"sdcli {' '.join(arguments)} {streams}", where)
    assert done.returncode == (8 if ">/dev/full" in streams.replace("2>", "") else 0), done
    assert is_clean(done.stderr)
    if streams == ">/dev/full":
        assert done.stderr == b"sdcli: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("streams", [*CLOSED, ">/dev/full", "2>/dev/full"])
def test_an_image_is_generated_with_any_streams(streams: str, tmp_path: Path) -> None:
    code, out, err = run_forked_raw(["generate", "fox", *TINY[:-1]], cwd=tmp_path, streams=streams)
    assert sheet_of(tmp_path) == ["00001-1-fox.png"]
    assert code == (8 if streams == ">/dev/full" else 0)
    assert is_clean(err)
    if streams in ("<&-", "2>&-", "2>/dev/full"):
        assert out == b"outputs/00001-1-fox.png\n"
    if streams == ">/dev/full":
        assert err.endswith(b"sdcli: cannot write to stdout: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["generate", "fox", "-o", "x.gif"], 2), (["info", "none.png"], 3), (["generate", "--prompts-file", "-"], 2)],
)
@pytest.mark.parametrize("streams", [*CLOSED, ">/dev/full", "2>/dev/full"])
def test_a_failure_keeps_its_exit_code(arguments: list[str], code: int, streams: str, tmp_path: Path) -> None:
    done, out, err = run_forked_raw(arguments, cwd=tmp_path, streams=streams)
    assert done == code
    assert out == b""
    assert is_clean(err)


CHEAP = [
    ["generate", "fox", "日本の狐", *TINY], ["generate", "fox", *TINY, "--json"],
    ["generate", "狐", *TINY, "--dry-run"],
    ["tokens", "a 狐 🦊", "-m", "tiny"], ["tokens", "a 狐", "-m", "tiny", "--json"], ["models", "list"],
    ["models", "show", "tiny", "--json"], ["info", "{picture}"], ["info", "{picture}", "--json"],
    ["compare", "{picture}", "{picture}"], ["grid", "{picture}", "-o", "sheet.png"],
    ["gallery", "{folder}", "--overwrite"],
    ["control-map", "canny", "{picture}", "-o", "map.png"], ["encode", "{picture}", "-m", "tiny"],
    ["noise", "{picture}", "-m", "tiny", "--steps", "2", "-o", "noise.png"],
    ["dataset", "check", "{folder}", "--unconditional"],
    ["dataset", "stats", "{folder}"], ["dataset", "shard", "{folder}", "-o", "shards"],
]  # fmt: skip


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose name, folder and prompt have letters of several scripts, and a byte that is no text."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures") / os.fsdecode("狐 caf\u00e9 \u200d".encode() + b"\xe9")
    folder.mkdir()
    code, _, err = run_forked_raw(
        ["generate", "лиса و狐 🦊", *TINY, "-o", "狐.png", "--outdir", str(folder)], cwd=folder, streams=""
    )
    assert code == 0, err
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "b.png")
    return folder / "狐.png"


@pytest.fixture(scope="module")
def as_usual(picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Any]:
    """What a command prints with plain streams, and the files that it makes; once for all tests."""

    @cache
    def run(*arguments: str) -> tuple[int | None, bytes, list[str]]:
        where = tmp_path_factory.mktemp("usual")
        code, out, err = run_forked_raw(arguments, cwd=where, streams="")
        assert code in (0, 7), err
        return code, out, sorted(os.listdir(where))

    return lambda arguments: run(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("streams", SEVERAL)
@pytest.mark.parametrize("arguments", CHEAP, ids=lambda arguments: " ".join(arguments))
def test_commands_do_their_work_with_any_streams(
    arguments: list[str], streams: str, picture: Path, as_usual: Any, tmp_path: Path
) -> None:
    given = [one.format(picture=picture, folder=picture.parent) for one in arguments]
    usual, said, files = as_usual(given)
    code, out, err = run_forked_raw(given, cwd=tmp_path, streams=streams)
    assert is_clean(err)
    assert code == (8 if streams.startswith(">/dev/full") else usual), err
    if streams.startswith("2>"):
        assert len(out.splitlines()) == len(said.splitlines())
    if not streams.startswith(">/dev/full"):  # a full disk may stop a command before its last file
        assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("arguments", CHEAP, ids=lambda arguments: " ".join(arguments))
def test_commands_do_their_work_in_any_encoding(
    arguments: list[str], encoding: str, picture: Path, as_usual: Any, tmp_path: Path
) -> None:
    given = [one.format(picture=picture, folder=picture.parent) for one in arguments]
    usual, said, files = as_usual(given)
    code, out, err = run_forked_raw(given, cwd=tmp_path, streams="", encoding=encoding)
    assert code == usual, err
    assert is_clean(err)
    assert sorted(os.listdir(tmp_path)) == files
    assert len(out.splitlines()) == len(said.splitlines())
    if "--json" in arguments or "--dry-run" in arguments:
        assert all(json.loads(line) for line in out.splitlines())


# The cases


@pytest.mark.slow
def test_letters_that_the_encoding_lacks_stop_nothing(tmp_path: Path) -> None:
    line = "sdcli generate 'a fox' '日本の狐' 'a castle' -m tiny --seed 1 --steps 1 --outdir u"
    done = shell(line, tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0
    paths = done.stdout.splitlines()
    assert len(paths) == 3
    assert all((tmp_path / os.fsdecode(path)).is_file() for path in paths)


def test_an_ascii_locale_reads_and_writes_utf8(tmp_path: Path) -> None:
    done = shell("sdcli generate '日本の狐' -m tiny --seed 1 --steps 1 -q --dry-run", tmp_path, **ASCII)
    assert json.loads(done.stdout)["prompt"] == "日本の狐"


@pytest.mark.parametrize("name", ["a\u200db\u200b", os.fsdecode(b"caf\xe9"), "a b\té"])
def test_a_path_is_printed_as_it_is(name: str, tmp_path: Path) -> None:
    code, out, err = run_forked_raw(["generate", "fox", *TINY, "--outdir", name], cwd=tmp_path, streams="")
    assert (code, err) == (0, b"")
    assert out == os.fsencode(f"{name}/00001-1-fox.png\n")
    assert (tmp_path / os.fsdecode(out[:-1])).is_file()
    code, out, _ = run_forked_raw(["generate", "fox", *TINY, "--outdir", name, "--json"], cwd=tmp_path, streams="")
    assert json.loads(out)["path"] == f"{name}/00001-1-fox-2.png"


def test_a_name_that_is_no_text_is_a_name(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    code, out, err = run_forked_raw(["generate", "fox", *TINY, "-o", name], cwd=tmp_path, streams="")
    assert (code, out, err) == (0, b"caf\xe9.png\n", b"")
    code, out, err = run_forked_raw(["generate", "fox", *TINY, "-o", name], cwd=tmp_path, streams="")
    assert (code, out) == (8, b"")
    assert err == b"sdcli: caf\\xe9.png exists already; --overwrite replaces it\n"


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--json"])
def test_a_reader_that_leaves_ends_the_command_quietly(more: str, tmp_path: Path) -> None:
    line = f"sdcli generate a b c d {' '.join(TINY)} --batch-size 1 {more} | head -1; exit ${{PIPESTATUS[0]}}"
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (141, b"")
    assert done.stdout.count(b"\n") == 1


def test_an_input_whose_name_is_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    given = ["generate", "fox", *TINY, "--init-image", os.fsdecode(b"caf\xe9.png")]
    code, _, err = run_forked_raw(given, cwd=tmp_path, streams="")
    assert code == 2
    assert err == b"sdcli: init_image.path: has bytes that are not UTF-8 text; rename the file, if it is one\n"


def test_outdir_that_is_a_file_is_refused(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sdcli("generate", "fox", *TINY, "--outdir", "file")
    assert (done.returncode, done.stderr) == (8, "sdcli: cannot make the folder file: File exists\n")


# Streams one by one


def test_stdout_fails_once_and_drops_the_rest() -> None:
    stream = io.BufferedWriter(_StdoutBytes(os.open("/dev/full", os.O_WRONLY)))
    stream.write(b"text")
    with pytest.raises(CannotWrite, match="cannot write to stdout: No space left on device"):
        stream.flush()
    stream.flush()
    stream.write(b"more")
    stream.flush()


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = io.BufferedWriter(_StdoutBytes(write))
    stream.write(b"text")
    with pytest.raises(ReaderGone):
        stream.flush()
    stream.flush()
    notes = io.TextIOWrapper(io.BufferedWriter(_StderrBytes(write)), line_buffering=True)
    notes.write("lost\n")
    os.close(write)
    notes.write("lost as well\n")


def test_a_busy_pipe_is_waited_for() -> None:
    import threading

    read, write = os.pipe()
    os.set_blocking(write, False)
    data = bytes(1_000_000)
    got: list[bytes] = []

    def drain() -> None:
        while (part := os.read(read, 65536)) != b"":
            got.append(part)

    thread = threading.Thread(target=drain)
    thread.start()
    stream = io.BufferedWriter(_StdoutBytes(write))
    stream.write(data)
    stream.flush()
    os.close(write)
    thread.join()
    assert b"".join(got) == data


def test_a_folder_on_stdin_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BadImage, match="cannot read stdin: Is a directory"):
        io.BufferedReader(_StdinBytes(descriptor)).read()
    os.close(descriptor)


# Text


def test_text_for_people_has_no_control_characters_and_no_lone_bytes() -> None:
    assert printable("a\x1b[31m\u202e狐 \udce9 \ud800") == "a�[31m�狐 \\xe9 \\ud800"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "shift_jis"])
def test_readable_json_is_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": 'é狐🦊\u200b\u202e\x1b\udce9"\\\n', "b": [1, "ж"]}
    file = io.BytesIO()
    monkeypatch.setattr(console.sys, "stdout", io.TextIOWrapper(file, encoding=encoding, errors="strict"))  # type: ignore[attr-defined]
    Console().result(readable_json(value))
    line = file.getvalue().decode(encoding)
    assert json.loads(line) == value
    assert ("狐" in line) == (encoding in ("utf-8", "shift_jis"))


def test_a_terminal_shows_no_control_characters_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal: Any = Terminal()
    monkeypatch.setattr(console.sys, "stdout", terminal)  # type: ignore[attr-defined]
    Console().result(Path("a\x1b[31m\udce9.png"), "\t3 dB")
    assert terminal.getvalue() == "a�[31m\\xe9.png\t3 dB\n"


def test_a_line_that_went_out_just_before_a_signal_is_not_printed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(number: int, data: bytes) -> int:
        write(number, data)
        raise KeyboardInterrupt

    write, descriptor = os.write, os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    out = io.TextIOWrapper(io.BufferedWriter(_StdoutBytes(descriptor)))
    out.write("image.png\n")
    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        out.flush()
    monkeypatch.setattr(os, "write", write)
    out.flush()
    os.close(descriptor)
    assert (tmp_path / "out").read_text() == "image.png\n"
