"""Checkpoints of a run, written atomically: complete or absent after a kill, a full disk or a power cut.

A save takes these steps, and each is durably on the disk before the next starts:

1. A hidden folder in RUN is filled; every file and folder in it is fsynced.
2. manifest.json is written into it, with every file's size and SHA-256, and with a digest of itself.
3. It is renamed to RUN/checkpoint-<step>; RUN is fsynced. From now on the checkpoint exists.
4. RUN/current, a relative link, is replaced by a rename, so RUN/unet -> current/unet never mixes two checkpoints.
5. Then the oldest checkpoints are deleted, each renamed to a hidden name first, so that a partly deleted one is never
   read.

Readers trust only what the manifest verifies. So a crash leaves the old state or the new one, and at worst a hidden
folder, which the next save removes. The disk must have room for one checkpoint more than are kept. (Background:
Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcli.errors import CannotWrite, NotFound
from sdcli.io.files import exchange, sync_folder
from sdcli.io.temporary_files import sweep, temporary_path
from sdcli.training.state.disk import (
    DISK_FULL,
    bytes_in,
    errno_of,
    format_size,
    is_disk_error,
    make_folder,
    remove,
    strerror,
)
from sdcli.training.state.manifest import CHECKPOINT_NAME, BrokenCheckpoint, Manifest, read_manifest, seal, verify
from sdcli.training.state.model_links import swap_current

Report = Callable[[Path, str], None]
"""Called with each broken checkpoint that is left where it is, and with the reason it counts as broken."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, the facts in its manifest, and newer checkpoints that are broken, each with the reason."""

    path: Path
    step: int
    broken: tuple[tuple[Path, str], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], Mapping[str, str] | None],
    *,
    facts: Mapping[str, Any],
    keep: int | None,
    report: Report | None = None,
) -> Path:
    """Save RUN/checkpoint-<step> with the files that `write` makes, point RUN/current at it, delete the oldest.

    `write` may return the SHA-256 of files that it knows, by their relative names; the others are computed.
    `facts` (JSON) go into its manifest. At most `keep` complete checkpoints stay (None: all); the newest complete one,
    the one just saved and broken ones are never deleted. An existing checkpoint of the same step stays if its files are
    equal, is replaced atomically if they differ, and is kept as checkpoint-<step>.broken if it is broken. Returns the
    checkpoint's folder. Raises CannotWrite for a full disk and other errors of the disk, and whatever `write` raises;
    then no temporary folder is left, and the earlier checkpoints are unchanged.
    """
    copied = json.loads(json.dumps(dict(facts), allow_nan=False))  # fails before anything is written
    path = run / f"checkpoint-{step}"
    temporary = temporary_path(run, f"checkpoint-{step}")
    try:
        make_folder(run)
        _sweep(run)
        temporary.mkdir()
        known = write(temporary)
        seal(temporary, Manifest(step, {}, copied), known=known)
        _publish(temporary, path, report=report)
        swap_current(run, path.name)
    except BaseException as error:
        written = bytes_in(temporary)
        remove(temporary)
        if is_disk_error(error):
            raise _cannot_write(error, path, written=written) from error
        raise
    with contextlib.suppress(OSError):  # the new checkpoint is safe; the next save tries to delete old ones again
        _prune(run, saved=path, keep=keep, report=report)
    return path


def newest_checkpoint(run: Path) -> CheckpointInfo:
    """The newest checkpoint that passes verification; broken newer ones are listed and left where they are.

    Raises NotFound if there is none.
    """
    broken: list[tuple[Path, str]] = []
    try:
        entries = sorted(_listed(run), reverse=True)
    except OSError as error:
        raise NotFound(f"no checkpoint in {run}: {error.strerror}") from None
    for entry in entries:
        try:
            manifest = verify(entry.path)
        except BrokenCheckpoint as problem:
            broken.append((entry.path, str(problem)))
        else:
            return CheckpointInfo(entry.path, entry.step, tuple(broken), manifest.facts)
    if broken:
        reasons = "; ".join(f"{path.name} {reason}" for path, reason in broken)
        raise NotFound(f"no complete checkpoint in {run}: {reasons}")
    raise NotFound(f"no checkpoint in {run}")


def verify_checkpoint(path: Path) -> str | None:
    """Why a checkpoint is broken, as a predicate after its name; None for a complete one. Reads all its files."""
    try:
        verify(path)
    except BrokenCheckpoint as broken:
        return str(broken)
    return None


def _publish(temporary: Path, path: Path, *, report: Report | None) -> None:
    """Move a sealed folder to its final name, durably; what has that name stays complete until then."""
    run = path.parent
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_folder(run)
        return
    try:
        before = verify(path)
    except BrokenCheckpoint as broken:
        aside = _free_name(run, f"{path.name}.broken")
        os.rename(path, aside)
        os.rename(temporary, path)
        sync_folder(run)
        _report(report, aside, str(broken))
        return
    if before.files != read_manifest(temporary).files:
        if exchange(temporary, path):
            sync_folder(run)
        else:  # two renames; a reader in between, or after a crash, finds the old checkpoint under its second name
            replaced = run / f"{path.name}.replaced"
            os.rename(path, replaced)
            sync_folder(run)
            os.rename(temporary, path)
            sync_folder(run)
            _delete(replaced)
    remove(temporary)


def _free_name(run: Path, name: str) -> Path:
    number = 1
    path = run / name
    while os.path.lexists(path):
        number += 1
        path = run / f"{name}-{number}"
    return path


def _prune(run: Path, *, saved: Path, keep: int | None, report: Report | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, but no broken ones.

    The digests are verified only of those to be deleted: to read all the others would take longer than saving.
    """
    for entry in _listed(run):
        if entry.replaced and (run / f"checkpoint-{entry.step}").is_dir():
            _delete(entry.path)
    if keep is None:
        return
    whole: list[_CheckpointFolder] = []
    for entry in sorted(_listed(run)):
        try:
            verify(entry.path, content=False)
            whole.append(entry)
        except BrokenCheckpoint as broken:
            _report(report, entry.path, str(broken))
    excess = len(whole) - keep
    for entry in whole[:-1]:  # never the newest, even if it is older than this run
        if excess <= 0:
            break
        if entry.path == saved or entry.path.is_symlink():
            continue
        excess -= 1
        reason = verify_checkpoint(entry.path)
        if reason is None:
            _delete(entry.path)
        else:
            _report(report, entry.path, reason)


def _delete(path: Path) -> None:
    """Delete a checkpoint under a hidden name, so that it is never read with some of its files missing."""
    hidden = temporary_path(path.parent, f"{path.name.removesuffix('.replaced')}-old")
    os.rename(path, hidden)
    sync_folder(path.parent)
    remove(hidden)


def _sweep(run: Path) -> None:
    """Remove leftovers of dead processes and of this one, which holds the lock of RUN and has no other save running."""
    with contextlib.suppress(OSError):
        sweep(run, of_this_process=True)
        for entry in _listed(run):  # a crash between the two renames of `_publish`
            if entry.replaced and not os.path.lexists(run / f"checkpoint-{entry.step}"):
                os.rename(entry.path, run / f"checkpoint-{entry.step}")


@dataclass(frozen=True, order=True)
class _CheckpointFolder:
    """A folder in RUN with a checkpoint's name; sorted by step."""

    step: int
    plain: bool
    """False for `checkpoint-<step>.replaced`, which is deleted once its replacement is there."""
    path: Path

    @property
    def replaced(self) -> bool:
        return not self.plain


def _listed(run: Path) -> list[_CheckpointFolder]:
    matches = [(CHECKPOINT_NAME.fullmatch(name), run / name) for name in os.listdir(run)]
    return [_CheckpointFolder(int(match[1]), match[2] is None, path) for match, path in matches if match]


def _report(report: Report | None, path: Path, reason: str) -> None:
    if report is not None:
        report(path, reason)


def _cannot_write(error: BaseException, path: Path, *, written: int) -> CannotWrite:
    sentence = f"cannot write {path}: {strerror(error)}"
    if errno_of(error) in DISK_FULL:
        needed = max([written, *_sizes_of_others(path.parent)])
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            sentence += (
                f"; a checkpoint of this run takes {format_size(needed)} or more, and {format_size(free)} are free"
            )
    return CannotWrite(f"{sentence}; earlier checkpoints are unchanged")


def _sizes_of_others(run: Path) -> list[int]:
    try:
        return [bytes_in(entry.path) for entry in _listed(run)]
    except OSError:
        return []
