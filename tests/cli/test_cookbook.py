"""docs/cookbook.md: its commands are understood, its images are there, and it can be generated again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sdcli.cli.app import app
from tests.conftest import REPOSITORY

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
def test_the_whole_page_is_painted_again(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "again"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = {path.name for path in FOLDER.rglob("*.png")}
    assert shown
    assert {path.name for path in (tmp_path / "again").rglob("*.png")} == shown
