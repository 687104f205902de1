"""SHA-256 digests of files, remembered by path, size, time and inode, those of large files from run to run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

import platformdirs

from sdcli.errors import CannotWrite, NotFound, SdcliError
from sdcli.io.files import sha256, write_whole
from sdcli.io.json_files import read_json_object

LARGE = 16 * 1024**2
"""Bytes of a file whose digest is worth a line in the user's cache folder."""
MOST = 2000
"""Files in it; the ones that were added first go first."""
SETTLED_S = 2.0
"""A file that changed less than this ago could change once more without a new time, and is not remembered."""

_known: dict[FileState, str] = {}
_lock = threading.Lock()
_SHA256 = re.compile("[0-9a-f]{64}")


class FileState(NamedTuple):
    """What would be another one if the file had other bytes."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The present state of a file. Raises OSError."""
        facts = os.stat(path)
        return cls(str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits; it is read again only when it has changed. Raises OSError.

    A large file in the hub's cache is named by its digest, and is not read at all.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    state = FileState.of(real)
    with _lock:
        digest = _known.get(state)
    if digest is not None:
        return digest
    large = state.size >= LARGE
    digest = _stored().get(state) if large else None
    if digest is None:
        digest = sha256(real)
        if time.time_ns() - state.mtime_ns < SETTLED_S * 1e9:
            return digest
        if large:
            _store(state, digest)
    with _lock:
        if len(_known) >= MOST:
            _known.clear()
        _known[state] = digest
    return digest


def _file() -> Path:
    return platformdirs.user_cache_path("sdcli") / "digests.json"


def _stored() -> dict[FileState, str]:
    """What earlier runs have stored; nothing where the file is missing or damaged."""
    found: dict[FileState, str] = {}
    with contextlib.suppress(SdcliError, OSError):
        for path, entry in read_json_object(_file()).items():
            match entry:
                case [int(size), int(mtime_ns), int(inode), str(digest)] if _SHA256.fullmatch(digest):
                    found[FileState(path, size, mtime_ns, inode)] = digest
    return found


def _store(state: FileState, digest: str) -> None:
    """Add a digest to the file; nothing happens where it cannot be written, but that the file is read again."""
    kept = {old: known for old, known in _stored().items() if old.path != state.path} | {state: digest}
    rows = {one.path: [*one[1:], known] for one, known in list(kept.items())[-MOST:]}
    with contextlib.suppress(CannotWrite, NotFound, OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(rows).encode(), overwrite=True)
