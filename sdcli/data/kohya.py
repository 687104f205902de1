"""Kohya's folders `10_zzq kettle`: how often an image is sampled in an epoch, and the name of its class."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from sdcli.data.folder_listing import Listing

MAX_REPEATS = 999_999
_FOLDER = re.compile(r"(\d{1,6})_(.+)")


class KohyaFolder(NamedTuple):
    """What the name of a folder says (kohya's sd-scripts, `extract_dreambooth_params`)."""

    repeats: int
    name: str


def kohya_folders(names: Sequence[str], *, below: int, captioned: bool) -> dict[str, KohyaFolder]:
    """Folder -> what its name says, where every image lies in such a folder; else {}.

    The folders are those directly in DATA, after `below` leading folders that are splits. Where images have no captions
    of their own (`captioned`), names that count up, `0_cat`, `1_dog`, are numbered classes and not repeats.
    """
    folders = {name.split("/")[below] if name.count("/") > below else "" for name in names}
    found = {folder: _FOLDER.fullmatch(folder) for folder in folders}
    parsed = {folder: KohyaFolder(int(match[1]), match[2]) for folder, match in found.items() if match is not None}
    if len(parsed) < len(found) or not all(folder.repeats for folder in parsed.values()):
        return {}
    return {} if not captioned and _count_up(folders) else parsed


def _count_up(folders: Collection[str]) -> bool:
    """Whether there are several folders, whose numbers follow each other: `1_cat`, `2_dog`."""
    numbers = sorted(int(match[1]) for folder in folders if (match := _FOLDER.fullmatch(folder)) is not None)
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(folders))) if numbers else False
    return consecutive and len(folders) > 1


def repeats_of(folders: dict[str, KohyaFolder], *, below: int) -> Callable[[str], int]:
    """A function from an image's path to its repeats; 1 without kohya's folders."""
    if not folders:
        return lambda name: 1
    return lambda name: folders[name.split("/")[below]].repeats


def class_of_kohya(folders: dict[str, KohyaFolder], *, below: int) -> Callable[[str], str | None]:
    """A function from an image's path to its class, the folder's name without the number; None if all have the same."""
    if len({folder.name for folder in folders.values()}) < 2:
        return lambda name: None
    return lambda name: folders[name.split("/")[below]].name


def remark_folders(
    names: Sequence[str], folders: dict[str, KohyaFolder], listing: Listing, *, captioned: bool, below: int
) -> None:
    """Say which folders are repeated, which might have been, and that the name of a lone folder is no caption."""
    if folders:
        counts = [f"{folder!r} {repeats:,} times" for folder, (repeats, _) in sorted(folders.items())]
        shown = ", ".join(counts[:5]) + (f" and {len(counts) - 5:,} more" if len(counts) > 5 else "")
        text = f"the images of a folder count as often in an epoch as its name says, as in kohya's scripts: {shown}"
        listing.remark(f"{min(folders)}/", text)
    inside = {name.split("/")[below] if name.count("/") > below else "" for name in names}
    if not captioned and not folders and _count_up(inside):
        text = (
            "counts up with the folders beside it, so they are numbered classes, whose whole names are the captions; "
            "for repeats as in kohya's scripts give the images caption files, or the folders other numbers"
        )
        listing.remark(f"{min(inside)}/", text)
    if not captioned and len(inside) == 1 and "" not in inside:
        listing.remark(f"{inside.pop()}/", "is the only folder, so its name is neither a caption nor a class")
