"""Names of temporary files and folders, and removing those that a killed process left behind.

Several machines and containers may share a folder, and each has its own process ids. So a name holds the machine as
well as the process: what a dead process of this machine left goes at once, what another machine made (or this one
before it was booted) only when nothing in it has changed for an hour.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3600.0
"""A temporary file unchanged for so long was abandoned: writers of large files write all the time."""
_NAME = re.compile(r"\.sdcli-(?:([0-9a-f]{8})-)?([0-9]+)-.*\.tmp", re.DOTALL)


def temporary_path(folder: Path, label: str = "") -> Path:
    """A name in `folder` that nothing has yet, and that `sweep` recognizes; `label` is for people."""
    parts = (".sdcli", machine(), str(os.getpid()), secrets.token_hex(4), *([label] if label else []))
    return folder / f"{'-'.join(parts)}.tmp"


def sweep(folder: Path, *, of_this_process: bool = False) -> None:
    """Remove the temporary files and folders that killed processes left in a folder, as far as the disk permits.

    Those of this process stay unless `of_this_process`, for a caller who knows that it writes nothing there now.
    """
    with contextlib.suppress(OSError):
        now: float | None = None
        for entry in list(os.scandir(folder)):
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            path, process = Path(entry.path), int(match[2])
            if match[1] == machine():
                abandoned = of_this_process if process == os.getpid() else not alive(process)
            else:
                now = file_clock(folder) if now is None else now
                abandoned = now - max(_changes(path), default=now) > STALE_SECONDS
            if abandoned:
                _remove(path)


@functools.cache
def machine() -> str:
    """Where this process's id is unique: 8 hex digits for the host, its boot and, in a container, its process table."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host's name must do
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def alive(process: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def file_clock(folder: Path) -> float:
    """The time by the file system, which on a shared one is the server's. Raises OSError."""
    probe = temporary_path(folder, "clock")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(probe)


def _changes(path: Path) -> Iterator[float]:
    """When a file, or anything in a folder, was changed; what vanishes meanwhile is left out."""
    with contextlib.suppress(OSError):
        yield path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for place, folders, files in os.walk(path):
            for name in (*folders, *files):
                with contextlib.suppress(OSError):
                    yield Path(place, name).lstat().st_mtime


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
