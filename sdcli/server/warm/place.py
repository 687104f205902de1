"""Where warm workers listen: a Unix socket for each setting of device and dtype, in a folder of the user alone.

The worker that holds the lock of a socket owns it; the kernel drops the lock when the worker dies, so a socket whose
lock is free is stale.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import CannotWrite, UsageError

ANSWER = 1.0
"""Seconds in which a worker takes a connection, and says who it is."""


class Unsafe(UsageError):
    """Another user could have made the socket."""


@dataclass(frozen=True)
class Place:
    """The socket of the workers with one setting of device and dtype, as the options spell them."""

    device: str
    dtype: str

    @property
    def address(self) -> Path:
        return self._file("sock")

    @property
    def log(self) -> Path:
        return self._file("log")

    def _file(self, suffix: str) -> Path:
        return folder() / f"{self.device.replace(':', '-')}-{self.dtype}.{suffix}"

    def exists(self) -> bool:
        """Whether there is a socket; all that a command without any worker spends time on."""
        return possible() and self.address.exists()

    def connect(self) -> socket.socket:
        """A connection to the worker. Raises Unsafe, and OSError where none answers."""
        check_folder()
        found = self.address.lstat()
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise Unsafe(f"{self.address} is not a socket of this user")
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(ANSWER)
            connection.connect(str(self.address))
            check_peer(connection)
        except (OSError, Unsafe):
            connection.close()
            raise
        return connection

    def lock(self) -> int | None:
        """A file descriptor that holds the right to listen until it is closed; None where another process has it."""
        import fcntl

        check_folder(create=True)
        descriptor = os.open(self._file("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def listen(self) -> socket.socket:
        """A socket to accept from, for the holder of the lock; a stale one is replaced. Raises CannotWrite."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            self.address.unlink(missing_ok=True)
            listener.bind(str(self.address))  # in a folder that no one else can enter, even before the next line
            self.address.chmod(0o600)
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise CannotWrite(f"cannot listen on {self.address}: {error.strerror or error}") from None
        return listener

    def remove_stale(self) -> None:
        """Remove the socket unless a process holds its lock."""
        descriptor = self.lock()
        if descriptor is not None:
            self.address.unlink(missing_ok=True)
            os.close(descriptor)


def as_option(device: str) -> str:
    """A device as --device of `sdcli generate` names it, where it does: its cuda is the first one."""
    return "cuda" if device == "cuda:0" else device


def possible() -> bool:
    """Whether this system has Unix sockets and file locks, as all but Windows have."""
    return os.name == "posix" and hasattr(socket, "AF_UNIX")


def folder() -> Path:
    """The folder of the sockets: in the user's runtime folder, or else below that of temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return Path(runtime) / "sdcli"
    import tempfile

    return Path(tempfile.gettempdir()) / f"sdcli-{os.geteuid()}"


def check_folder(*, create: bool = False) -> None:
    """Raise Unsafe for a folder of the sockets that is another user's, or that others may enter."""
    place = folder()
    if create:
        with contextlib.suppress(FileExistsError):
            try:
                place.mkdir(mode=0o700)
            except FileNotFoundError:
                raise CannotWrite(f"no folder {place.parent}") from None
            except PermissionError:
                raise CannotWrite(f"cannot make the folder {place}") from None
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise Unsafe(f"{place} is not a folder of this user")
    if found.st_mode & 0o077:
        raise Unsafe(f"other users may enter {place}; chmod 700 {place}")


def check_peer(connection: socket.socket) -> None:
    """Raise Unsafe where the process at the other end is another user's; the kernel knows it, on Linux.

    Elsewhere the folder, which no other user can enter, is what keeps others out.
    """
    if sys.platform == "linux":
        facts = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", facts)
        if user != os.geteuid():
            raise Unsafe(f"the other end of the socket is a process of user {user}")
