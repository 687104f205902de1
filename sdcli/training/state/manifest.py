"""The manifest of a checkpoint: every file's size and SHA-256, written last and verified before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.io.files import sync_file, sync_folder
from sdcli.io.json_files import parse_json
from sdcli.training.state.disk import permit, strerror, write_all

MANIFEST = "manifest.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 * 2**20
JUNK = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-fA-F]+|\.directory")
"""Names of files that systems put into any folder, also into a checkpoint that was copied."""
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})(\.replaced)?")


class BrokenCheckpoint(Exception):
    """A checkpoint that fails verification; the message is a predicate after its name."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: the step, each file's size and SHA-256 by name, and facts about the run."""

    step: int
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    def as_bytes(self) -> bytes:
        """Canonical JSON with its own SHA-256, so that no byte of it can change unnoticed."""
        content = {"schema": SCHEMA, "step": self.step, "files": self.files, "facts": self.facts}
        return _spelled({**content, "digest": hashlib.sha256(_spelled(content)).hexdigest()})


def verify(folder: Path, *, content: bool = True) -> Manifest:
    """The manifest of a checkpoint after verification: its files, their sizes and, with `content`, their digests.

    Raises BrokenCheckpoint.
    """
    try:
        manifest = read_manifest(folder)
        sizes, _ = list_files(folder)
        del sizes[MANIFEST]
        missing, extra = manifest.files.keys() - sizes.keys(), sizes.keys() - manifest.files.keys()
        for name in {name for name in extra if JUNK.fullmatch(name.rsplit("/", 1)[-1])}:
            extra.remove(name)
            del sizes[name]
        if missing:
            raise BrokenCheckpoint(f"lacks {_shown(min(missing))}, which its manifest lists")
        if extra:
            raise BrokenCheckpoint(f"holds {_shown(min(extra))}, which its manifest does not list")
        for name, size in sizes.items():
            expected = manifest.files[name]["size"]
            if size != expected:
                raise BrokenCheckpoint(f"is damaged: {_shown(name)} has {size:,} bytes of {expected:,}")
        for name, digest in digests_of(folder, sizes).items() if content else ():
            if digest != manifest.files[name]["sha256"]:
                raise BrokenCheckpoint(f"is damaged: {_shown(name)} has changed (its SHA-256 differs)")
    except (OSError, RecursionError) as error:
        raise BrokenCheckpoint(f"cannot be read: {strerror(error)}") from None
    return manifest


def read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise BrokenCheckpoint("is not a folder")
    try:
        found = os.lstat(folder / MANIFEST)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"has no {MANIFEST}: it was never finished, or it is not from sdcli") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
        raise BrokenCheckpoint(f"has a {MANIFEST} that is not a file, or too large")
    raw = (folder / MANIFEST).read_bytes()
    try:
        match parse_json(raw):
            case {"schema": int(schema)} if schema != SCHEMA:
                raise BrokenCheckpoint(
                    f"was written by another version of sdcli (schema {schema}, this one reads {SCHEMA})"
                )
            case {"step": int(step), "files": dict(files), "facts": dict(facts)} if all(map(_is_entry, files.values())):
                manifest = Manifest(step, files, facts)
            case _:
                raise BrokenCheckpoint(f"has a {MANIFEST} without step, files and facts")
        if manifest.as_bytes() != raw:
            raise BrokenCheckpoint(f"has a {MANIFEST} that was changed after it was written")
    except ValueError:
        raise BrokenCheckpoint(f"has a {MANIFEST} that is not JSON") from None
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    if match and int(match[1]) != step:
        raise BrokenCheckpoint(f"is of step {step}, which its name contradicts")
    return manifest


def seal(folder: Path, manifest: Manifest, *, known: Mapping[str, str] | None = None) -> None:
    """Sync everything in a folder to the disk, then its manifest. Raises OSError, and ValueError for links.

    `known`: the SHA-256 of files that other processes wrote, synced and read again.
    """
    sizes = sync_tree(folder)
    known = known or {}
    digests = {**known, **digests_of(folder, {name: size for name, size in sizes.items() if name not in known})}
    files = {name: {"size": size, "sha256": digests[name]} for name, size in sizes.items()}
    # unbuffered, so that a failed write raises here
    with open(folder / MANIFEST, "xb", buffering=0) as file:
        write_all(file.fileno(), Manifest(manifest.step, files, manifest.facts).as_bytes())
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_tree(folder: Path) -> dict[str, int]:
    """Sync everything in a folder to the disk; returns the files' sizes. Raises OSError, and ValueError for links."""
    try:
        sizes, folders = list_files(folder)
    except BrokenCheckpoint as broken:
        raise ValueError(f"a checkpoint that {broken} cannot be verified later") from None
    for name in sizes:
        permit(folder / name)
        sync_file(folder / name)
    for name in reversed(folders):
        sync_folder(folder / name)
    return sizes


def list_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The sizes of all files below a folder, and its folders, outer ones first; by relative POSIX paths."""
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
                raise BrokenCheckpoint(f"holds {_shown(relative)}, which is not a regular file")
    return sizes, folders


def _spelled(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _is_entry(entry: object) -> bool:
    match entry:
        case {"size": int(), "sha256": str()}:
            return True
    return False


def _raise(error: OSError) -> None:
    raise error


def digests_of(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """The SHA-256 of files, computed in threads, because one core hashes slower than a fast disk reads."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if sum(sizes.values()) < 2**24:  # done before threads have started
        return {name: digest(name) for name in sizes}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(sizes, pool.map(digest, sizes), strict=True))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")
