"""The files below a folder by kind, and which of them belong to a split (train, validation, test)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdcli.data.records import DroppedItem
from sdcli.data.tables import TABLE_NAMES
from sdcli.errors import NotFound, UsageError
from sdcli.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES

LATENT_SUFFIXES = frozenset({".safetensors", ".latent"})
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the names that its folder may have, as in Hugging Face's datasets."""
ALL_SPLITS = "all"


@dataclass(frozen=True)
class Tree:
    """The files of a folder and its sub-folders by kind: relative paths with slashes, sorted, hidden ones left out."""

    root: Path
    images: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    tars: tuple[str, ...] = ()
    parquets: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    others: frozenset[str] = frozenset()
    """Everything else; caption files are looked up here."""
    hidden: tuple[str, ...] = ()
    """Images whose name begins with a dot; other hidden files are no data."""
    dropped: tuple[DroppedItem, ...] = ()


def scan(root: Path) -> Tree:
    """All files below a folder; links are followed, except into a folder that contains them. Raises NotFound."""
    kinds: dict[str, list[str]] = {name: [] for name in ("images", "latents", "tars", "parquets", "tables")}
    others: set[str] = set()
    dropped: list[DroppedItem] = []
    hidden: list[str] = []
    for name in sorted(_walk(root, dropped, hidden)):
        base = name.rpartition("/")[2]
        suffix = PurePosixPath(base).suffix.lower()
        if base in TABLE_NAMES:
            kinds["tables"].append(name)
        elif suffix in IMAGE_SUFFIXES:
            kinds["images"].append(name)
        elif suffix in LATENT_SUFFIXES:
            kinds["latents"].append(name)
        elif suffix == ".tar" or base.lower().endswith((".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz")):
            kinds["tars"].append(name)
        elif suffix == ".parquet":
            kinds["parquets"].append(name)
        elif suffix in UNREAD_SUFFIXES:
            dropped.append(DroppedItem(name, unsupported(suffix)))
        else:
            others.add(name)
    found: dict[str, Any] = {kind: tuple(names) for kind, names in kinds.items()}
    found["dropped"] = tuple(sorted(dropped, key=lambda one: one.name))
    return Tree(root, **found, others=frozenset(others), hidden=tuple(sorted(hidden)))


def _walk(root: Path, dropped: list[DroppedItem], hidden: list[str]) -> Iterator[str]:
    """Relative paths of the regular files, in no particular order."""
    pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    while pending:
        folder, below, above = pending.pop()
        try:
            facts = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            if not below:
                raise NotFound(f"cannot read the folder {root}: {error.strerror}") from None
            dropped.append(DroppedItem(below.rstrip("/"), f"is a folder that cannot be read: {error.strerror}"))
            continue
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:  # a link to a folder that contains it
            continue
        for entry in entries:
            name = below + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                # `._a.png` is what macOS knows about a.png, not an image
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("._"):
                    hidden.append(name)
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself, or through a file
                dropped.append(DroppedItem(name, f"cannot be examined: {error.strerror}"))
                continue
            if is_folder:
                pending.append((entry.path, f"{name}/", above | {identity}))
            elif is_file:
                yield name
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES | LATENT_SUFFIXES | {".tar", ".parquet"}:
                dropped.append(DroppedItem(name, "is a broken link" if entry.is_symlink() else "is not a regular file"))


def unsupported(suffix: str) -> str:
    """Why a file with a suffix of UNREAD_SUFFIXES is not used."""
    return f"is in an unsupported format ({suffix}); convert it to PNG or JPEG"


# Splits


def split_by_folder(names: Sequence[str], *, split: str, source: str) -> tuple[tuple[str, ...], int]:
    """The relative paths that belong to a split, and the number of leading folders (0 or 1) that are splits.

    Sub-folders are splits if all of them are named like splits; without any, everything is `train`. Raises UsageError
    if only some are, or if the requested split does not exist.
    """
    tops = sorted({name.partition("/")[0] if "/" in name else "" for name in names})
    named = {top: canonical for top in tops if (canonical := split_called(top)) is not None}
    if not named or (split == ALL_SPLITS and len(named) < len(tops)):
        _check_split(split, {"train"}, source)
        return tuple(names), 0
    if len(named) < len(tops):
        others = ", ".join(top or "files outside of folders" for top in tops if top not in named)
        raise UsageError(
            f"{source} has {', '.join(named)} beside {others}, so they may be splits or classes: give {source}/"
            f"{next(iter(named))} for one split, or --split {ALL_SPLITS} for everything"
        )
    _check_split(split, set(named.values()), source)
    wanted = set(named.values()) if split == ALL_SPLITS else {split_called(split)}
    return tuple(name for name in names if named[name.partition("/")[0]] in wanted), 1


def split_by_name(names: Sequence[str], *, split: str, source: str) -> tuple[tuple[str, ...], tuple[DroppedItem, ...]]:
    """The shards or parquet files that belong to a split, by their folder or a word of their name.

    If no name contains a split, all are `train`; otherwise files without one are dropped. Raises UsageError.
    """
    split_of = {name: split_of_path(name) for name in names}
    if split == ALL_SPLITS or not any(split_of.values()):
        _check_split(split, {"train"}, source)
        return tuple(names), ()
    _check_split(split, {name for name in split_of.values() if name}, source)
    without_split = (
        DroppedItem(name, "belongs to no split, while other files do") for name in names if split_of[name] is None
    )
    return tuple(name for name in names if split_of[name] == split_called(split)), tuple(without_split)


def split_of_files(files: Sequence[str], *, split: str, source: str) -> tuple[tuple[str, ...], tuple[DroppedItem, ...]]:
    """Those of a file, or of the files of a pattern, that belong to a split, by a word of their name.

    Where no name has such a word, their common folder's may have one. All of them are `train`, the default, as it was
    the user who chose them. Raises UsageError if the requested split does not exist.
    """
    if split == ALL_SPLITS or split_called(split) == "train":
        return tuple(files), ()
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    below = {os.path.relpath(os.path.abspath(file), common): file for file in files}
    if not any(split_of_path(name) for name in below):
        below = {f"{os.path.basename(common)}/{name}": file for name, file in below.items()}
    names, silent = split_by_name(list(below), split=split, source=source)
    return tuple(below[name] for name in names), silent


def split_called(name: str) -> str | None:
    """The split that a word stands for, or None."""
    return next((split for split, words in SPLITS.items() if name.lower() in words), None)


def split_of_path(name: str) -> str | None:
    """The split that a folder or a word in a path stands for, or None."""
    words = PurePosixPath(name).with_suffix("").as_posix()
    for separator in "/-_. ":
        words = words.replace(separator, "\n")
    return next((split for word in words.split("\n") if (split := split_called(word.rstrip("0123456789")))), None)


def _check_split(split: str, present: set[str], source: str) -> None:
    if split != ALL_SPLITS and split_called(split) not in present:
        raise UsageError(f"{source} has no split {split!r}; it has {', '.join(sorted(present))} (--split)")
