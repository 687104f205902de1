"""Atomic writes (a temporary file in the same folder, fsync, then link or rename), and digests of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sdcli.errors import CannotWrite, UsageError
from sdcli.io.temporary_files import temporary_path

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package `sdcli`."""


class AlreadyExists(CannotWrite):
    """The file exists already, and overwriting it was not requested."""


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` replaced; an unknown user stays as typed."""
    return Path(os.path.expanduser(path))


def lies_inside(folder: Path, data: str) -> bool:
    """Whether a folder is in the folder DATA, or is it; DATA may also be a file, a pattern or a data set of the hub."""
    source = expanded(data)
    return source.is_dir() and expanded(folder).resolve().is_relative_to(source.resolve())


def refuse_inside(folder: Path, data: str, *, choose: str) -> None:
    """Raise UsageError for a folder to write into that `lies_inside` DATA; `choose` says what to change."""
    if lies_inside(folder, data):
        raise UsageError(f"{folder} is inside {data}, which is never changed; choose {choose}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered(name: PurePosixPath, number: int) -> PurePosixPath:
    """`cat.png`, 2 -> `cat-2.png`; 1 is the name itself."""
    return name if number == 1 else name.with_name(f"{name.stem}-{number}{name.suffix}")


def check_folder(folder: Path) -> None:
    """Create a folder if it is missing, and raise CannotWrite now if files cannot be written into it later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"no permission to write into {folder}")


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise AlreadyExists if the path exists and may not be overwritten."""
    if not overwrite and os.path.lexists(path):
        raise AlreadyExists(f"{path} exists already; --overwrite replaces it")


def check_new_png(path: Path, *, flag: str, overwrite: bool) -> None:
    """`check_new` for the PNG image that the option `flag` writes. Raises UsageError for another suffix than .png."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{flag} writes a PNG image: {path.name!r} should end in .png")
    check_new(path, overwrite=overwrite)


@contextlib.contextmanager
def whole_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends without an exception, it becomes `path` atomically.

    Without `overwrite` an existing file is never replaced, not even one that another process creates meanwhile.
    Raises AlreadyExists and CannotWrite; the temporary file is removed in every case.
    """
    check_new(path, overwrite=overwrite)
    temporary = temporary_path(path.parent)
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
    """Write bytes to a file atomically; see `whole_file`."""
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
    """A link fails if the name exists, where a rename would replace it; FAT and some network disks have no links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.rename(temporary, path)


def permitted_mode() -> int:
    """The permissions of a new file under the umask."""
    try:
        umask = int(Path("/proc/self/status").read_text().partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):  # not Linux: there it can only be read by setting it for a moment
        umask = os.umask(0o077)
        os.umask(umask)
    return 0o666 & ~umask


def open_writable(path: Path, flags: int) -> int:
    """Open a file to write, created if missing, and made writable if a copy left it read-only. Raises OSError."""
    try:
        return os.open(path, flags | os.O_CREAT, 0o666)
    except PermissionError:
        os.chmod(path, permitted_mode())
        return os.open(path, flags | os.O_CREAT, 0o666)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot. Raises OSError.

    Uses Linux's renameat2 with RENAME_EXCHANGE, which Python does not offer.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one))


def megabytes(size: int) -> str:
    """A size for people: 512 KB, 34 MB, 2.1 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            value = size / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size} bytes"
