"""Folders and files of a run on the disk: durable folders, permissions, sizes, and what an error of the disk means."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from pathlib import Path

from safetensors import SafetensorError

from sdcli.io.files import permitted_mode, sync_folder

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a folder, or a link to one; errors are ignored."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def permit(file: Path) -> None:
    """Give a file the permissions of the umask, which safetensors ignores."""
    if stat.S_IMODE(file.stat().st_mode) != permitted_mode():
        os.chmod(file, permitted_mode())


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def format_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk caused an error. safetensors wraps the system's errors in its own class."""
    return isinstance(error, OSError) or (isinstance(error, SafetensorError) and errno_of(error) is not None)


def errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # the messages of safetensors, and of shutil.copytree, which joins its errors into one
    match = re.search(r"\(os error ([0-9]{1,5})\)|\[Errno ([0-9]{1,5})\]", str(error))
    return int(match[1] or match[2]) if match else None


def strerror(error: BaseException) -> str:
    number = errno_of(error)
    return str(error) or type(error).__name__ if number is None else os.strerror(number)
