"""The merged model of a LoRA run: RUN/merged-<step>-<digest>, one at a time, made from a checkpoint and no part of it.

A checkpoint of a LoRA holds what is trained. For RUN to be a model folder all the same, the networks with the LoRA
merged into them stand beside the checkpoints, and only the newest ones: RUN/unet -> merged/unet, RUN/merged ->
merged-<step>-<digest of the checkpoint's manifest>. They are replaced by a rename, as RUN/current is, and can be made
again at any time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sdcli.errors import CannotWrite
from sdcli.io.files import sha256, write_whole
from sdcli.io.temporary_files import temporary_path
from sdcli.training.state.disk import is_disk_error, make_folder, remove, strerror
from sdcli.training.state.manifest import MANIFEST, sync_tree
from sdcli.training.state.model_links import copy_part, point, read_link

MERGED = "merged"
_NAME = re.compile(r"merged-[0-9]{1,18}-[0-9a-f]{12}")


def is_merged(run: Path, checkpoint: Path, parts: Collection[str]) -> bool:
    """Whether RUN/merged is the merged model of this checkpoint, and RUN has its parts."""
    link, name = run / MERGED, _name_for(checkpoint)
    try:
        found = os.readlink(link) if link.is_symlink() else link.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return False
    return found == name and all((run / part).exists() for part in parts)


def write_merged(run: Path, checkpoint: Path, write: Callable[[Path], None], parts: Mapping[str, str]) -> None:
    """Write a checkpoint's merged model with the files that `write` makes, and point RUN/<part> at its folder there.

    Earlier merged models are deleted afterwards. Where the file system has no links, the parts are copies. Raises
    CannotWrite, and whatever `write` raises; the earlier merged model stays then.
    """
    folder = run / _name_for(checkpoint)
    temporary = temporary_path(run, folder.name)
    try:
        temporary.mkdir()
        write(temporary)
        sync_tree(temporary)
        if os.path.lexists(folder):
            _delete(folder)
        os.rename(temporary, folder)
        linked = point(run / MERGED, folder.name)
        for part, inside in parts.items():
            target = os.path.relpath(run / MERGED / inside, (run / part).parent)
            make_folder((run / part).parent)
            if not linked:
                copy_part(folder / inside, run / part)
            elif read_link(run / part) != target:
                point(run / part, target)
        if not linked:
            write_whole(run / MERGED, f"{folder.name}\n".encode(), overwrite=True)
    except BaseException as error:
        remove(temporary)
        if is_disk_error(error):
            raise CannotWrite(f"cannot write the merged model {folder}: {strerror(error)}") from error
        raise
    with contextlib.suppress(OSError):  # the next one tries again
        for entry in os.scandir(run):
            if _NAME.fullmatch(entry.name) and (entry.name != folder.name or not linked):
                _delete(Path(entry.path))


def _name_for(checkpoint: Path) -> str:
    return f"{MERGED}-{checkpoint.name.removeprefix('checkpoint-')}-{sha256(checkpoint / MANIFEST)[:12]}"


def _delete(folder: Path) -> None:
    """Delete a folder under a hidden name, so that none is ever read with some of its files missing."""
    hidden = temporary_path(folder.parent, f"{folder.name}-old")
    os.rename(folder, hidden)
    remove(hidden)
