"""Digests of files: read once, read again when the file is another, and remembered from run to run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from sdcli.io import digests
from sdcli.io.digests import digest_of

NEW_YEAR = 1_700_000_000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in a process that remembers none and finds every file worth storing."""
    found: list[Path] = []

    def sha256(path: Path) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "sha256", sha256)
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "_known", {})
    return found


def file(path: Path, text: str = "weights", *, time: float = NEW_YEAR) -> Path:
    path.write_text(text)
    os.utime(path, (time, time))
    return path


def test_a_file_is_read_once_until_it_is_another(tmp_path: Path, reads: list[Path]) -> None:
    path = file(tmp_path / "a")
    assert digest_of(path) == digest_of(path) == hashlib.sha256(b"weights").hexdigest()
    assert len(reads) == 1
    digest_of(file(path, "WEIGHTS", time=NEW_YEAR + 1))
    digest_of(file(path, "longer weights", time=NEW_YEAR + 1))
    other = file(tmp_path / "b", "LONGER WEIGHTS", time=NEW_YEAR + 1)
    os.replace(other, path)
    assert digest_of(path) == hashlib.sha256(b"LONGER WEIGHTS").hexdigest()
    assert len(reads) == 4


def test_another_process_reads_no_large_file_again(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [file(tmp_path / name, name) for name in "ab"]
    first = [digest_of(path) for path in paths]
    monkeypatch.setattr(digests, "_known", {})
    assert [digest_of(path) for path in paths] == first
    assert reads == paths


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    digest_of(path)
    path.write_text("two")
    assert digest_of(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"PATH": [7, 1, 2, "not a digest"]}', "\0"])
def test_a_damaged_memory_is_none(tmp_path: Path, reads: list[Path], text: str) -> None:
    path = file(tmp_path / "a")
    memory = Path(os.environ["XDG_CACHE_HOME"]) / "sdcli" / "digests.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(text.replace("PATH", str(path)))
    assert digest_of(path) == hashlib.sha256(b"weights").hexdigest()
    assert [*json.loads(memory.read_text())] == [str(path)]


def test_a_cache_folder_that_cannot_be_written_does_no_harm(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    assert digest_of(file(tmp_path / "a")) == hashlib.sha256(b"weights").hexdigest()


def test_a_file_that_the_hub_named_by_its_digest_is_not_read(tmp_path: Path, reads: list[Path]) -> None:
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_text("weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digest_of(tmp_path / "model.safetensors") == name
    assert not reads
