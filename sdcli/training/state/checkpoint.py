"""Checkpoints of a run that are there whole or not at all, whoever is killed, whatever is full or loses its power.

A save goes through these steps, and each is on the disk before the next begins:

1. A hidden folder in RUN is filled; every file and folder in it is fsynced.
2. manifest.json is written into it, with every file's size and SHA-256, and with a digest of itself.
3. It is renamed to RUN/checkpoint-<step>; RUN is fsynced. From here on the checkpoint exists.
4. RUN/current, a relative link, is swapped by a rename. RUN/unet -> current/unet never sees two checkpoints mixed.
5. Only now are the oldest ones deleted, each renamed to a hidden name first, so that half of one is never taken for it.

A reader trusts what its manifest verifies, and nothing else. So a crash leaves the old state or the new one, and at
worst a hidden folder, which the next save sweeps away. The disk must hold one checkpoint more than are kept. (The
rule behind it: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sdcli.errors import BadOutput, CannotWrite, NotFound
from sdcli.io.files import exchange, permitted_mode, sync_file, sync_folder, whole_file, write_whole
from sdcli.io.json_files import parse_json
from sdcli.io.temporary_files import sweep, temporary_path

MANIFEST = "manifest.json"
CURRENT = "current"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 2**20
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What `symlink` fails with where there are none: FAT, some network disks."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(\.replaced)?")

Report = Callable[[Path, str], None]
"""Is told about each broken checkpoint that was left where it is, and why it counts as broken."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint, what its manifest says of it, and the newer ones that are broken, each with the reason."""

    path: Path
    step: int
    broken: tuple[tuple[Path, str], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    facts: Mapping[str, Any],
    keep: int | None,
    report: Report | None = None,
) -> Path:
    """Make RUN/checkpoint-<step> of what `write` puts into a folder, point RUN/current at it, delete the oldest.

    `facts` (JSON) go into its manifest. At most `keep` whole ones stay, None keeps all; the newest whole one, the one
    just saved and broken ones are never deleted. A checkpoint of that step that is there already stays if it holds the
    same files, is replaced at once if it holds others, and is kept as checkpoint-<step>.broken if it is broken.
    Returns the checkpoint's folder. Raises CannotWrite for a full disk and whatever else the disk refuses, and what
    `write` raises; no temporary folder is left then, and the checkpoints before are as they were.
    """
    told = json.loads(json.dumps(dict(facts), allow_nan=False))  # fails before anything is written
    path = run / f"checkpoint-{step}"
    temporary = temporary_path(run, f"checkpoint-{step}")
    try:
        _make_folder(run)
        _sweep(run)
        temporary.mkdir()
        write(temporary)
        _seal(temporary, _Manifest(step, {}, told))
        _publish(temporary, path, report=report)
        _swap_current(run, path.name)
    except BaseException as error:
        written = _bytes_in(temporary)
        _remove(temporary)
        if _is_of_the_disk(error):
            raise _cannot_write(error, path, written=written) from error
        raise
    with contextlib.suppress(OSError):  # the new checkpoint is safe; the next save tries again to delete the old
        _prune(run, saved=path, keep=keep, report=report)
    return path


def newest_checkpoint(run: Path) -> CheckpointInfo:
    """The newest checkpoint that verifies wholly; broken newer ones are named and left where they are.

    Raises NotFound where there is none.
    """
    broken: list[tuple[Path, str]] = []
    try:
        entries = sorted(_listed(run), reverse=True)
    except OSError as error:
        raise NotFound(f"no checkpoint in {run}: {error.strerror}") from None
    for entry in entries:
        try:
            manifest = _verified(entry.path)
        except _Broken as problem:
            broken.append((entry.path, str(problem)))
        else:
            return CheckpointInfo(entry.path, entry.step, tuple(broken), manifest.facts)
    if broken:
        reasons = "; ".join(f"{path.name} {reason}" for path, reason in broken)
        raise NotFound(f"no whole checkpoint in {run}: {reasons}")
    raise NotFound(f"no checkpoint in {run}")


def verify_checkpoint(path: Path) -> str | None:
    """Why a checkpoint is broken, to be read after its name; None for a whole one. Reads all of it."""
    try:
        _verified(path)
    except _Broken as broken:
        return str(broken)
    return None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite; to be called before they are saved. Raises BadOutput."""
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        raise BadOutput(
            f"{len(bad)} of {len(tensors)} tensors hold NaN or infinite numbers, first {bad[0]}; they are not saved"
        )


def current_checkpoint(run: Path) -> Path | None:
    """The checkpoint that RUN/current leads to, not verified; None before the first one."""
    current = run / CURRENT
    try:
        name = os.readlink(current) if current.is_symlink() else current.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return run / name if _CHECKPOINT.fullmatch(name) and (run / name).is_dir() else None


def link_model_folder(run: Path, parts: Mapping[str, str]) -> None:
    """Let RUN/<part> lead to current/<folder or file> for every pair, so that RUN is a model that others load.

    To be called after each `save_checkpoint`: a link is made the first time (never before there is a checkpoint, so
    that none dangles) and then follows RUN/current by itself. Where the file system has no links, the files are
    copied each time instead, each appearing whole. Raises NotFound before the first checkpoint, and CannotWrite, also
    where something else stands in a link's place.
    """
    checkpoint = current_checkpoint(run)
    if checkpoint is None:
        raise NotFound(f"{run} has no checkpoint yet that its model could be linked to")
    for part, inside in parts.items():
        target = os.path.relpath(run / CURRENT / inside, (run / part).parent)
        try:
            _make_folder((run / part).parent)
            if not (run / CURRENT).is_symlink():
                _copy(checkpoint / inside, run / part)
            elif _read_link(run / part) != target:
                _point(run / part, target)
        except (OSError, _Broken) as error:
            raise CannotWrite(f"cannot let {run / part} lead to {checkpoint.name}: {_strerror(error)}") from error


def write_frozen_parts(run: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put the parts that training leaves alone into RUN, and bring them to the disk.

    To be called before the first checkpoint: whoever has that has all of the model. Raises CannotWrite, and what
    `write` raises; a second try writes over what the first one left.
    """
    try:
        write(run)
        for folder, _, names in os.walk(run):
            for path in (Path(folder) / name for name in names):
                if not path.is_symlink():
                    _permit(path)
                    sync_file(path)
            sync_folder(Path(folder))
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        raise CannotWrite(f"cannot write the parts of the model into {run}: {_strerror(error)}") from error


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold RUN, which is made if need be, for this process alone; the system lets go of it when the process ends.

    Raises CannotWrite where another process holds it, where RUN cannot be written, and where RUN/current is a folder.
    A file system without locks (some network disks) is taken as it is, and two runs in one folder are not noticed.
    """
    try:
        _make_folder(run)
        with contextlib.suppress(PermissionError):  # a folder above that may be passed through but not read
            sync_folder(run.absolute().parent)
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CannotWrite(f"cannot write into {run}: {_strerror(error)}") from None
    _held.add(descriptor)
    try:
        _lock(descriptor, run)
        if (run / CURRENT).is_dir() and not (run / CURRENT).is_symlink():
            raise CannotWrite(f"{run / CURRENT} should be a link and is a folder, as a copy makes it; delete it")
        yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


# Locks

_held: set[int] = set()


def _forget_locks() -> None:
    """In a forked child: a worker that outlives the training process must not go on holding its lock."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock(descriptor: int, run: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}:
            return
        holder = os.read(descriptor, 200).decode("ascii", "replace").strip()
        who = f" ({holder})" if re.fullmatch(r"process [0-9]+ on [\w.-]+", holder) else ""
        raise CannotWrite(f"{run} is in use by another training process{who}; wait for it, or use another -o") from None
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"), 0)


# Writing


def _seal(folder: Path, manifest: _Manifest) -> None:
    """Bring everything in a folder to the disk, and then its manifest. Raises OSError, and ValueError for links."""
    try:
        sizes, folders = _tree(folder)
    except _Broken as broken:
        raise ValueError(f"a checkpoint that {broken} cannot be verified later") from None
    for name in sizes:
        _permit(folder / name)
        sync_file(folder / name)
    for name in reversed(folders):
        sync_folder(folder / name)
    digests = _digests(folder, sizes)
    files = {name: {"size": size, "sha256": digests[name]} for name, size in sizes.items()}
    # unbuffered: what cannot be written fails here, in this line
    with open(folder / MANIFEST, "xb", buffering=0) as file:
        _write_all(file.fileno(), _Manifest(manifest.step, files, manifest.facts).as_bytes())
        os.fsync(file.fileno())
    sync_folder(folder)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _permit(file: Path) -> None:
    """safetensors makes its files private, whatever the umask says."""
    if stat.S_IMODE(file.stat().st_mode) != permitted_mode():
        os.chmod(file, permitted_mode())


def _publish(temporary: Path, path: Path, *, report: Report | None) -> None:
    """Let a sealed folder take its place in RUN, durably; whatever stands there stays whole until then."""
    run = path.parent
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_folder(run)
        return
    try:
        before = _verified(path)
    except _Broken as broken:
        aside = _free_name(run, f"{path.name}.broken")
        os.rename(path, aside)
        os.rename(temporary, path)
        sync_folder(run)
        _report(report, aside, str(broken))
        return
    if before.files != _read_manifest(temporary).files:
        if exchange(temporary, path):
            sync_folder(run)
        else:  # two renames; a reader between them, or after a crash there, finds the old one under its second name
            replaced = run / f"{path.name}.replaced"
            os.rename(path, replaced)
            sync_folder(run)
            os.rename(temporary, path)
            sync_folder(run)
            _delete(replaced)
    _remove(temporary)


def _free_name(run: Path, name: str) -> Path:
    number = 1
    path = run / name
    while os.path.lexists(path):
        number += 1
        path = run / f"{name}-{number}"
    return path


def _swap_current(run: Path, name: str) -> None:
    if not _point(run / CURRENT, name):
        write_whole(run / CURRENT, f"{name}\n".encode(), overwrite=True)


def _point(link: Path, target: str) -> bool:
    """Make or replace a relative link at once and durably; False where there are no links. Raises OSError."""
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


def _read_link(path: Path) -> str | None:
    return os.readlink(path) if path.is_symlink() else None


def _copy(source: Path, target: Path) -> None:
    """A file, or a folder's files, each replaced whole; what a folder had beside them goes."""
    if not source.is_dir():
        with whole_file(target, overwrite=True) as temporary:
            shutil.copyfile(source, temporary)
        return
    sizes, _ = _tree(source)
    for name in sizes:
        with whole_file(target / name, overwrite=True) as temporary:
            shutil.copyfile(source / name, temporary)
    for name in _tree(target)[0]:
        if name not in sizes:
            (target / name).unlink()


# Deleting


def _prune(run: Path, *, saved: Path, keep: int | None, report: Report | None) -> None:
    """Delete the oldest beyond `keep`. The others are weighed only by their sizes, what is deleted is read wholly:
    a broken one is never deleted, and reading all that stay would take longer than saving."""
    for entry in _listed(run):
        if entry.replaced and (run / f"checkpoint-{entry.step}").is_dir():
            _delete(entry.path)
    if keep is None:
        return
    whole: list[_Entry] = []
    for entry in sorted(_listed(run)):
        try:
            _verified(entry.path, content=False)
            whole.append(entry)
        except _Broken as broken:
            _report(report, entry.path, str(broken))
    excess = len(whole) - keep
    for entry in whole[:-1]:  # never the newest, be it older than this run
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
    """Delete a checkpoint under a hidden name, so that it is never found with some of its files gone."""
    hidden = temporary_path(path.parent, f"{path.name.removesuffix('.replaced')}-old")
    os.rename(path, hidden)
    sync_folder(path.parent)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Delete a folder, or a link to one, as far as the system lets us."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(run: Path) -> None:
    """Remove what dead processes left, and what this one did: RUN is locked, so it is at no other save."""
    with contextlib.suppress(OSError):
        sweep(run, of_this_process=True)
        for entry in _listed(run):  # a crash between the two renames of `_publish`
            if entry.replaced and not os.path.lexists(run / f"checkpoint-{entry.step}"):
                os.rename(entry.path, run / f"checkpoint-{entry.step}")


# Reading


class _Broken(Exception):
    """A checkpoint that does not verify; the reason reads on after its name."""


@dataclass(frozen=True, order=True)
class _Entry:
    """A folder in RUN with a checkpoint's name; in the order of their age."""

    step: int
    plain: bool
    """Not `checkpoint-<step>.replaced`, which gives way to the one that replaces it."""
    path: Path

    @property
    def replaced(self) -> bool:
        return not self.plain


def _listed(run: Path) -> list[_Entry]:
    matches = [(_CHECKPOINT.fullmatch(name), run / name) for name in os.listdir(run)]
    return [_Entry(int(match[1]), match[2] is None, path) for match, path in matches if match]


@dataclass(frozen=True)
class _Manifest:
    """What a checkpoint says of itself: the step, each file's size and SHA-256 by its name, and the run's facts."""

    step: int
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    def as_bytes(self) -> bytes:
        """JSON in one spelling only, with its own SHA-256, so that no byte of it can change unnoticed."""
        content = {"schema": SCHEMA, "step": self.step, "files": self.files, "facts": self.facts}
        return _spelled({**content, "digest": hashlib.sha256(_spelled(content)).hexdigest()})


def _spelled(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _verified(folder: Path, *, content: bool = True) -> _Manifest:
    """The manifest of a checkpoint that has exactly its files, of its sizes and, with `content`, its digests."""
    try:
        manifest = _read_manifest(folder)
        sizes, _ = _tree(folder)
        del sizes[MANIFEST]
        missing, extra = manifest.files.keys() - sizes.keys(), sizes.keys() - manifest.files.keys()
        if missing:
            raise _Broken(f"lacks {_shown(min(missing))}, which its manifest names")
        if extra:
            raise _Broken(f"holds {_shown(min(extra))}, which its manifest does not name")
        for name, size in sizes.items():
            expected = manifest.files[name]["size"]
            if size != expected:
                raise _Broken(f"is damaged: {_shown(name)} has {size:,} bytes of {expected:,}")
        for name, digest in _digests(folder, sizes).items() if content else ():
            if digest != manifest.files[name]["sha256"]:
                raise _Broken(f"is damaged: {_shown(name)} is not what was written (its SHA-256 differs)")
    except (OSError, RecursionError) as error:
        raise _Broken(f"cannot be read: {_strerror(error)}") from None
    return manifest


def _read_manifest(folder: Path) -> _Manifest:
    if not folder.is_dir():
        raise _Broken("is no folder")
    try:
        found = os.lstat(folder / MANIFEST)
    except FileNotFoundError:
        raise _Broken(f"has no {MANIFEST}: it was never finished, or another tool made it") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
        raise _Broken(f"has something else in the place of its {MANIFEST}")
    raw = (folder / MANIFEST).read_bytes()
    try:
        match parse_json(raw):
            case {"schema": int(schema)} if schema != SCHEMA:
                raise _Broken(f"was written by another version of sdcli (schema {schema}, this one knows {SCHEMA})")
            case {"step": int(step), "files": dict(files), "facts": dict(facts)} if all(map(_is_entry, files.values())):
                manifest = _Manifest(step, files, facts)
            case _:
                raise _Broken(f"has a {MANIFEST} without step, files and facts")
        if manifest.as_bytes() != raw:
            raise _Broken(f"has a {MANIFEST} that was changed after it was written")
    except ValueError:
        raise _Broken(f"has a {MANIFEST} that is no JSON") from None
    match = _CHECKPOINT.fullmatch(folder.name)
    if match and int(match[1]) != step:
        raise _Broken(f"is of step {step}, whatever its name says")
    return manifest


def _is_entry(entry: object) -> bool:
    match entry:
        case {"size": int(), "sha256": str()}:
            return True
    return False


def _tree(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Every file below a folder with its size, and the folders, outer ones first; by relative names with slashes."""
    sizes: dict[str, int] = {}
    folders: list[str] = []
    for place, inner, names in os.walk(folder, onerror=_raise):
        for name in sorted((*inner, *names)):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                sizes[relative] = found.st_size
            elif stat.S_ISDIR(found.st_mode):
                folders.append(relative)
            else:
                raise _Broken(f"holds {_shown(relative)}, which is no ordinary file")
    return sizes, folders


def _raise(error: OSError) -> None:
    raise error


def _digests(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """The SHA-256 of files; several at once, for one core hashes slower than a good disk reads."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if sum(sizes.values()) < 2**24:  # read before the threads have started
        return {name: digest(name) for name in sizes}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(sizes, pool.map(digest, sizes), strict=True))


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(wide.isfinite().all())


# What is told


def _report(report: Report | None, path: Path, reason: str) -> None:
    if report is not None:
        report(path, reason)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _is_of_the_disk(error: BaseException) -> bool:
    """safetensors tells the system's errors in its own class; its others are mistakes of the caller."""
    return isinstance(error, OSError) or (isinstance(error, SafetensorError) and _errno(error) is not None)


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # of safetensors, and of shutil.copytree, which gathers all errors in one
    match = re.search(r"\(os error ([0-9]{1,5})\)|\[Errno ([0-9]{1,5})\]", str(error))
    return int(match[1] or match[2]) if match else None


def _strerror(error: BaseException) -> str:
    number = _errno(error)
    return str(error) or type(error).__name__ if number is None else os.strerror(number)


def _cannot_write(error: BaseException, path: Path, *, written: int) -> CannotWrite:
    sentence = f"cannot write {path}: {_strerror(error)}"
    if _errno(error) in FULL:
        needed = max([written, *_sizes_of_others(path.parent)])
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            sentence += f"; a checkpoint of this run takes {_size(needed)} or more, and {_size(free)} are free"
    return CannotWrite(f"{sentence}; the checkpoints before it are untouched")


def _sizes_of_others(run: Path) -> list[int]:
    try:
        return [_bytes_in(entry.path) for entry in _listed(run)]
    except OSError:
        return []


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _make_folder(folder: Path) -> None:
    """A folder and those above it, durably. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
