"""The lock that keeps two processes from training in one RUN."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from sdcli.errors import CannotWrite
from sdcli.io.files import open_writable, sync_folder
from sdcli.io.temporary_files import temporary_path
from sdcli.training.state.disk import make_folder, strerror


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Lock RUN, which is created if missing, for this process; the system releases the lock when the process ends.

    Raises CannotWrite where another process has the lock, and where RUN cannot be written. On file systems without
    locks (some network disks) two runs in one folder go unnoticed.
    """
    try:
        make_folder(run)
        with contextlib.suppress(PermissionError):  # a parent folder without read permission
            sync_folder(run.absolute().parent)
        descriptor = open_writable(run / ".lock", os.O_RDWR)
    except OSError as error:
        raise CannotWrite(f"cannot write into {run}: {strerror(error)}") from None
    _held.add(descriptor)
    mine = [descriptor]
    try:
        _lock(descriptor, run)
        if os.fstat(descriptor).st_nlink > 1:
            mine.append(_own_lock(run))
        yield
    finally:
        for descriptor in mine:
            if descriptor in _held:
                _held.discard(descriptor)
                os.close(descriptor)


_held: set[int] = set()
"""The descriptors of the locks that this process holds."""


def _forget_locks() -> None:
    """Close inherited locks in a forked child: a worker that outlives the training process must not keep its lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


def _own_lock(run: Path) -> int:
    """A lock file of RUN's own, locked, in place of one that it shares with a copy of the run by a hard link.

    The shared one stays locked as well, for a process that opened it before. Raises CannotWrite.
    """
    temporary = temporary_path(run, "lock")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _held.add(descriptor)
        _lock(descriptor, run)
        os.replace(temporary, run / ".lock")
    except OSError as error:
        raise CannotWrite(f"cannot write into {run}: {strerror(error)}") from None
    return descriptor


def _lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
            return
        holder = os.read(descriptor, 200).decode("ascii", "replace").strip()
        who = f" ({holder})" if re.fullmatch(r"process [0-9]+ on [\w.-]+", holder) else ""
        copy = ""
        if os.fstat(descriptor).st_nlink > 1:
            copy = f" (if {run} is a copy that shares its files with that run, by hard links, delete {run / '.lock'})"
        raise CannotWrite(
            f"{run} is in use by another training process{who}; wait for it, or use another -o{copy}"
        ) from None
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"), 0)
