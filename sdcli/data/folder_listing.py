"""Caption files and class folders of loose files: shared by the listings of images and of latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from sdcli.data.records import DroppedItem, Item, Remark, UnusableEntry, captions_of_file, read_file
from sdcli.errors import BadImage, NotFound

CAPTION_LIKE = frozenset({".txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".prompt"})
"""Usual extensions of caption files; a file with one that is not --caption-extension gives a remark."""


@dataclass
class Listing:
    """What a listing collects besides the items."""

    dropped: list[DroppedItem] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """Files that were read, or that a remark is about, besides the images."""

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(DroppedItem(name, reason))

    def remark(self, name: str, text: str, *, loses: bool = False) -> None:
        self.remarks.append(Remark(name, text, loses))


def with_caption_file(root: Path, item: Item, file: str, listing: Listing) -> Item | None:
    try:
        captions = captions_of_file(read_file(root / file), name=file)
    except UnusableEntry as problem:
        listing.drop(item.name, str(problem))
        return None
    except (BadImage, NotFound) as error:
        listing.drop(item.name, f"its caption cannot be read: {error}")
        return None
    if not captions:
        listing.remark(item.name, "its caption file is empty", loses=True)
    return replace(item, captions=captions)


def class_of(names: Sequence[str], *, below: int) -> Callable[[str], str | None]:
    """A function from an image's path to its class: the first folder in which the paths differ (as in torchvision).

    `below` leading folders are splits. If any image lies in no folder, or all in the same one, there are no classes
    (as in Hugging Face's datasets, where a lone folder is no label).
    """
    folders = [name.split("/")[below:-1] for name in names]
    if not folders or not all(folders):
        return no_class
    depth = 0
    while all(len(path) > depth + 1 for path in folders) and len({path[depth] for path in folders}) == 1:
        depth += 1
    if len({path[depth] for path in folders}) == 1:
        return no_class
    return lambda name: name.split("/")[below + depth]


def no_class(name: str) -> str | None:
    return None


def caption_files(others: Iterable[str], extension: str) -> dict[str, str]:
    """Path without suffix -> the caption file of that name; `.TXT` counts as `.txt`."""
    found: dict[str, str] = {}
    for name in sorted(others, reverse=True):  # of `a.TXT` and `a.txt` the latter comes last and wins
        if name.lower().endswith(extension.lower()):
            found[name[: -len(extension)]] = name
    return found


def other_caption_files(others: Iterable[str], extension: str) -> dict[str, str]:
    """Path without suffix -> a file that looks like a caption but has another extension."""
    suffixes = CAPTION_LIKE - {extension.lower()}
    return {stem_of(name): name for name in sorted(others) if PurePosixPath(name).suffix.lower() in suffixes}


def remark_other_splits(names: Sequence[str], chosen: Sequence[str], listing: Listing) -> None:
    """Say how many images (or latents) are in splits that were not chosen."""
    counts = Counter(name.partition("/")[0] for name in set(names).difference(chosen))
    for folder, count in sorted(counts.items()):
        listing.remark(f"{folder}/", f"is another split, whose {count:,} files are not used (--split)")


def stem_of(name: str) -> str:
    base = name.rpartition("/")[2]
    suffix = PurePosixPath(base).suffix
    return name[: -len(suffix)] if suffix else name


def base_of(name: str) -> str:
    return name.rpartition("/")[2]
