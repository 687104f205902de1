"""Makes the links of a run again that was copied without them: by `cp -rL`, `rsync -L` or zip, or to a FAT disk.

Where RUN had a link there is a folder then, with the files of a checkpoint. Such a folder is deleted if a checkpoint
has each of its files, byte for byte, and the link is made again; a folder with anything else in it is never touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sdcli.errors import CannotWrite
from sdcli.io.files import sha256
from sdcli.io.temporary_files import temporary_path
from sdcli.training.state.disk import remove, strerror
from sdcli.training.state.manifest import (
    CHECKPOINT_NAME,
    JUNK,
    MANIFEST,
    BrokenCheckpoint,
    list_files,
    read_manifest,
)
from sdcli.training.state.merged_model import MERGED
from sdcli.training.state.model_links import (
    CURRENT,
    current_checkpoint,
    has_links,
    link_model_folder,
    swap_current,
)

Known = Mapping[str, set[str]]
"""Relative name -> the SHA-256 of each file that has it in a checkpoint."""


def restore_links(run: Path, newest: str, parts: Mapping[str, str], merged: Mapping[str, str]) -> list[str]:
    """Make the links of a copied run again, with RUN/current at the checkpoint `newest` where it is no link.

    `parts` and `merged`: RUN/<part> -> its folder in a checkpoint, or in the merged model. Returns the names of what
    was a copy. Raises CannotWrite for a folder in the place of a link whose files no checkpoint has.
    """
    links = has_links(run)
    known, known_merged = _once(lambda: _of_checkpoints(run)), _once(lambda: _joined(run))
    places: list[tuple[str, str, Callable[[], Known]]] = [(CURRENT, "", known)]
    if links:
        places += [(MERGED, "", known_merged), *((part, f"{inside}/", known) for part, inside in parts.items())]
        places += [(part, f"{inside}/", known_merged) for part, inside in merged.items()]
    replaced = []
    for name, inside, files in places:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            _delete_copy(path, inside, files())
            replaced.append(name)
    try:
        for through, some in ((CURRENT, parts), (MERGED, merged)):
            for part, inside in some.items():
                _delete_text(run / part, os.path.relpath(run / through / inside, (run / part).parent))
        current = current_checkpoint(run)
        if current is None or (links and not (run / CURRENT).is_symlink()):
            swap_current(run, newest if current is None else current.name)
    except OSError as error:
        raise CannotWrite(f"cannot make the links of {run}: {strerror(error)}") from error
    if parts:
        link_model_folder(run, parts)
    return replaced


def _delete_text(path: Path, target: str) -> None:
    """Delete a file that holds a link's target, as archives are unpacked where there are no links."""
    expected = os.fsencode(target)
    is_text = path.is_file() and not path.is_symlink() and path.stat().st_size <= len(expected) + 1
    if is_text and path.read_bytes().strip() == expected:
        path.unlink()


def _delete_copy(folder: Path, inside: str, known: Known) -> None:
    """Delete a folder whose files all are in `known`, under `inside`. Raises CannotWrite for any other folder."""
    try:
        names = [name for name in list_files(folder)[0] if not JUNK.fullmatch(name.rsplit("/", 1)[-1])]
        strange = next((name for name in names if sha256(folder / name) not in known.get(f"{inside}{name}", ())), None)
    except (OSError, BrokenCheckpoint) as error:
        strange = str(error)
    if strange is not None:
        raise CannotWrite(
            f"{folder} is a folder where the run has a link, and no checkpoint has its {strange}; move it away, then "
            "--resume makes the link"
        )
    hidden = temporary_path(folder.parent, f"{folder.name}-copy")
    os.rename(folder, hidden)
    remove(hidden)


def _of_checkpoints(run: Path) -> Known:
    """The files of all checkpoints, by their manifests, which are files, too."""
    known: dict[str, set[str]] = {}
    for name in os.listdir(run):
        if not CHECKPOINT_NAME.fullmatch(name):
            continue
        try:
            manifest = read_manifest(run / name)
            known.setdefault(MANIFEST, set()).add(sha256(run / name / MANIFEST))
        except (OSError, BrokenCheckpoint):
            continue
        for file, entry in manifest.files.items():
            known.setdefault(file, set()).add(entry["sha256"])
    return known


def _joined(run: Path) -> Known:
    """The files of the merged models, which have no manifests, and those of the checkpoints."""
    known = {name: set(digests) for name, digests in _of_checkpoints(run).items()}
    for folder in run.glob(f"{MERGED}-*"):
        for name in list_files(folder)[0]:
            known.setdefault(name, set()).add(sha256(folder / name))
    return known


def _once(make: Callable[[], Known]) -> Callable[[], Known]:
    """A function that makes its value when it is first called."""
    made: list[Known] = []

    def value() -> Known:
        if not made:
            made.append(make())
        return made[0]

    return value
