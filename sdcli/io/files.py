"""Files that appear whole or not at all: a temporary file in the same folder, fsync, then link or rename; digests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdcli.errors import CannotWrite, UsageError

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package `sdcli`."""

_TEMPORARY = re.compile(r"\.sdcli-(\d+)-\d+(?:-[0-9a-f]+)?\.tmp")
_counter = itertools.count()


class AlreadyExists(CannotWrite):
    """The file is there, and nobody asked to overwrite it."""


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` at its beginning replaced; a user who does not exist stays as typed."""
    return Path(os.path.expanduser(path))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered(name: PurePosixPath, number: int) -> PurePosixPath:
    """`cat.png`, 2 -> `cat-2.png`; 1 is the name itself."""
    return name if number == 1 else name.with_name(f"{name.stem}-{number}{name.suffix}")


def check_folder(folder: Path) -> None:
    """Make a folder where it is missing, and raise CannotWrite now for what would fail after minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"no permission to write into {folder}")


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise AlreadyExists for a name that is taken, unless it may be overwritten."""
    if not overwrite and os.path.lexists(path):
        raise AlreadyExists(f"{path} exists already; --overwrite replaces it")


def check_new_png(path: Path, *, flag: str, overwrite: bool) -> None:
    """`check_new` for an image that `flag` names. Raises UsageError for another suffix than .png."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{flag} names no PNG image: {path.name!r} should end in .png")
    check_new(path, overwrite=overwrite)


@contextlib.contextmanager
def whole_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends well, it becomes `path` at once and durably.

    Without `overwrite` an existing file is never replaced, not even one that another process makes meanwhile.
    Raises AlreadyExists and CannotWrite; whatever happens, no temporary file is left.
    """
    check_new(path, overwrite=overwrite)
    temporary = path.parent / f".sdcli-{os.getpid()}-{next(_counter)}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {path.parent}: {error.strerror}") from None
    try:
        yield temporary
        _publish(temporary, path, overwrite=overwrite)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists already; --overwrite replaces it") from None
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write bytes as one whole file; see `whole_file`."""
    with whole_file(path, overwrite=overwrite) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    os.chmod(temporary, permitted_mode())  # safetensors makes its files private, whatever the umask says
    sync_file(temporary)
    if overwrite:
        os.replace(temporary, path)
    else:
        _link_or_rename(temporary, path)
    sync_folder(path.parent)


def _link_or_rename(temporary: Path, path: Path) -> None:
    """A link fails where the name is taken, a rename would replace it; FAT and some network disks have no links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.rename(temporary, path)


def permitted_mode() -> int:
    """The permissions of a new file, as the umask has them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that. Raises OSError."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system or the file system cannot. Raises OSError.

    Linux's renameat2 with RENAME_EXCHANGE, which Python has no name for.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    here, both_stay = -100, 2
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), both_stay) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one))


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed process left in a folder; those of living processes stay."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and not alive(int(match[1])):
            Path(entry.path).unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of that number runs on this computer."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
