"""RUN as a model folder: links to the newest checkpoint's parts, and the parts that training does not change."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from sdcli.errors import CannotWrite, NotFound
from sdcli.io.files import sync_file, sync_folder, whole_file, write_whole
from sdcli.io.temporary_files import temporary_path
from sdcli.training.state.disk import is_disk_error, make_folder, permit, strerror
from sdcli.training.state.manifest import CHECKPOINT_NAME, BrokenCheckpoint, list_files

CURRENT = "current"
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of `symlink` on file systems without links: FAT, some network disks."""


def current_checkpoint(run: Path) -> Path | None:
    """The checkpoint that RUN/current points to, not verified; None before the first one."""
    current = run / CURRENT
    try:
        name = os.readlink(current) if current.is_symlink() else current.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return run / name if CHECKPOINT_NAME.fullmatch(name) and (run / name).is_dir() else None


def link_model_folder(run: Path, parts: Mapping[str, str]) -> None:
    """Link RUN/<part> to current/<folder or file> for every pair, so that RUN is a model folder.

    Call it after each `save_checkpoint`: a link is made the first time (never before there is a checkpoint, so that it
    does not dangle) and then follows RUN/current. On file systems without links the files are copied each time instead,
    each atomically. Raises NotFound before the first checkpoint, and CannotWrite, also where a link's name is taken.
    """
    checkpoint = current_checkpoint(run)
    if checkpoint is None:
        raise NotFound(f"{run} has no checkpoint yet")
    for part, inside in parts.items():
        target = os.path.relpath(run / CURRENT / inside, (run / part).parent)
        try:
            make_folder((run / part).parent)
            if not (run / CURRENT).is_symlink():
                copy_part(checkpoint / inside, run / part)
            elif read_link(run / part) != target:
                point(run / part, target)
        except (OSError, BrokenCheckpoint) as error:
            raise CannotWrite(f"cannot link {run / part} to {checkpoint.name}: {strerror(error)}") from error


def write_frozen_parts(run: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put the parts that training does not change into RUN, and sync them to the disk.

    Call it before the first checkpoint, so that a run with a checkpoint has a complete model. Raises CannotWrite, and
    whatever `write` raises; a second try overwrites what the first one left.
    """
    try:
        write(run)
        for folder, _, names in os.walk(run):
            for path in (Path(folder) / name for name in names):
                if not path.is_symlink():
                    permit(path)
                    sync_file(path)
            sync_folder(Path(folder))
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise CannotWrite(f"cannot write the parts of the model into {run}: {strerror(error)}") from error


def has_links(run: Path) -> bool:
    """Whether the file system of RUN has links."""
    probe = temporary_path(run, "link")
    try:
        os.symlink(CURRENT, probe)
        os.unlink(probe)
    except OSError:
        return False
    return True


def swap_current(run: Path, name: str) -> None:
    if not point(run / CURRENT, name):
        write_whole(run / CURRENT, f"{name}\n".encode(), overwrite=True)


def point(link: Path, target: str) -> bool:
    """Make or replace a relative link atomically; False on file systems without links. Raises OSError."""
    temporary = temporary_path(link.parent, link.name)
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(target, temporary)
    except OSError as error:
        if error.errno in NO_LINKS:
            return False
        raise
    try:
        os.replace(temporary, link)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(link.parent)
    return True


def read_link(path: Path) -> str | None:
    """The target of a link; None for anything else."""
    return os.readlink(path) if path.is_symlink() else None


def copy_part(source: Path, target: Path) -> None:
    """Copy a file, or a folder's files, each atomically; other files in the target folder are deleted."""
    if not source.is_dir():
        with whole_file(target, overwrite=True) as temporary:
            shutil.copyfile(source, temporary)
        return
    sizes, _ = list_files(source)
    for name in sizes:
        with whole_file(target / name, overwrite=True) as temporary:
            shutil.copyfile(source / name, temporary)
    for name in list_files(target)[0]:
        if name not in sizes:
            (target / name).unlink()
