"""What a killed process left is removed; what another process, machine or container is writing is not."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from sdcli.io import temporary_files
from sdcli.io.temporary_files import STALE_SECONDS, sweep, temporary_path
from tests.faults import temporary_of


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def of_another_machine(process: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(temporary_files, "machine", lambda: "0" * 8)
        return temporary_of(process, folder)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)


def test_a_dead_process_of_this_machine_leaves_nothing(tmp_path: Path, dead: int) -> None:
    temporary_of(dead, tmp_path).write_bytes(b"half")
    folder = temporary_of(dead, tmp_path)
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_bytes(b"half")
    temporary_of(dead, tmp_path).symlink_to("nowhere")
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_stays_however_old(tmp_path: Path) -> None:
    paths = [temporary_path(tmp_path), temporary_path(tmp_path, "label"), temporary_of(os.getppid(), tmp_path)]
    for path in paths:
        path.write_bytes(b"half")
        age(path, 10 * STALE_SECONDS)
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == set(paths)
    sweep(tmp_path, of_this_process=True)
    assert set(tmp_path.iterdir()) == {paths[2]}


def test_another_machines_file_stays_until_it_is_old(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ids are its own: that none of this machine has the number says nothing."""
    fresh, old = (of_another_machine(dead, tmp_path, monkeypatch) for _ in range(2))
    for path, seconds in ((fresh, STALE_SECONDS / 2), (old, STALE_SECONDS * 2)):
        path.write_bytes(b"half")
        age(path, seconds)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_another_machines_folder_is_as_old_as_the_newest_thing_in_it(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, abandoned = (of_another_machine(dead, tmp_path, monkeypatch) for _ in range(2))
    for folder in (writing, abandoned):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_bytes(b"half")
    for path in (*abandoned.rglob("*"), abandoned, writing / "inner", writing):
        age(path, STALE_SECONDS * 2)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [writing]


def test_the_age_is_by_the_clock_of_the_file_system(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = of_another_machine(dead, tmp_path, monkeypatch)
    path.write_bytes(b"half")
    wrong = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: wrong)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_stay_and_a_missing_folder_is_no_error(tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".sdcli-journal.jsonl", "a.tmp", ".sdcli-x-1.tmp", "00001.png")]
    for path in others:
        path.write_bytes(b"")
        age(path, STALE_SECONDS * 2)
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == set(others)
    sweep(tmp_path / "missing")
