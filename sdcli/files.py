"""Files that appear whole or not at all: a temporary file in the same folder, fsync, then link or rename."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sdcli.errors import CannotWrite

_TEMPORARY = re.compile(r"\.sdcli-(\d+)-\d+\.tmp")
_counter = itertools.count()


class AlreadyExists(CannotWrite):
    """The file is there, and nobody asked to overwrite it."""


@contextlib.contextmanager
def whole_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends well, it becomes `path` at once and durably.

    Without `overwrite` an existing file is never replaced, not even one that another process makes meanwhile.
    Raises AlreadyExists and CannotWrite; whatever happens, no temporary file is left.
    """
    if not overwrite and os.path.lexists(path):
        raise AlreadyExists(f"{path} exists already; --overwrite replaces it")
    temporary = path.parent / f".sdcli-{os.getpid()}-{next(_counter)}.tmp"
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
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors makes its files private, whatever the umask says
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if overwrite:
        os.replace(temporary, path)
    else:
        _link_or_rename(temporary, path)
    _sync_folder(path.parent)


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


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed process left in a folder; those of living processes stay."""
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            Path(entry.path).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
