"""Caption files and class folders of loose files: shared by the listings of images and of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(DroppedItem(name, reason))

    def remark(self, name: str, text: str, *, loses: bool = False) -> None:
        self.remarks.append(Remark(name, text, loses))


def with_caption_file(root: Path, item: Item, file: str, listing: Listing) -> Item | None:
    try:
        captions = captions_of_file(read_file(root / file))
    except UnusableEntry as problem:
        listing.drop(item.name, str(problem))
        return None
    except (BadImage, NotFound) as error:
        listing.drop(item.name, f"its caption cannot be read: {error}")
        return None
    if not captions:
        listing.remark(item.name, "its caption file is empty", loses=True)
    return Item(item.name, captions, item.label)


def class_of(names: Sequence[str], *, below: int) -> Callable[[str], str | None]:
    """A function from an image's path to its class: the first folder in which the paths differ (as in torchvision).

    `below` leading folders are splits. If any image lies in no folder, there are no classes.
    """
    folders = [name.split("/")[below:-1] for name in names]
    if not folders or not all(folders):
        return no_class
    depth = 0
    while all(len(path) > depth + 1 for path in folders) and len({path[depth] for path in folders}) == 1:
        depth += 1
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
    """Path without suffix -> the suffix of a file that looks like a caption but has another extension."""
    pairs = ((stem_of(name), PurePosixPath(name).suffix) for name in sorted(others))
    return {stem: suffix for stem, suffix in pairs if suffix.lower() in CAPTION_LIKE - {extension.lower()}}


def stem_of(name: str) -> str:
    base = name.rpartition("/")[2]
    suffix = PurePosixPath(base).suffix
    return name[: -len(suffix)] if suffix else name


def base_of(name: str) -> str:
    return name.rpartition("/")[2]
