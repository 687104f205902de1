"""Pictures and the maps that belong to them: by a column of their table or rows, or by their names in two folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from sdcli.data.folders import LooseFiles, named_in_tables
from sdcli.data.parquet import ParquetRows
from sdcli.data.records import Item, Items, PictureSet
from sdcli.data.sources import open_pictures
from sdcli.errors import NotFound, UsageError
from sdcli.io.files import expanded

MAP_COLUMN = "conditioning_image"
"""What diffusers' scripts call the column, and Hugging Face's data sets for ControlNets have."""


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of a picture set, in the order of its pictures."""

    listed: PictureSet
    """All maps there are, in an order of their own."""
    places: np.ndarray
    """int64 [n]: where in `listed` the map of each picture is; -1 where there is none."""

    def __getitem__(self, index: int) -> Item:
        return self.listed[int(self.places[index])]

    def read(self, index: int) -> bytes:
        """The bytes of a picture's map. Raises BadPicture, NotFound and Offline."""
        return self.listed.read(int(self.places[index]))


def with_maps_of_folder(pictures: PictureSet, folder: str) -> tuple[PictureSet, Maps]:
    """Pair pictures in folders with the pictures of another folder that have the same names, up to the suffix.

    The first of the returned is the pictures without those that lie in that folder themselves. Raises NotFound, and
    UsageError where the names leave open what belongs together.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise NotFound(f"there is no folder {folder} (--conditioning-data-dir)")
    maps = open_pictures(root, split="all")
    if not isinstance(pictures, LooseFiles) or not isinstance(maps, LooseFiles):
        raise UsageError("--conditioning-data-dir is a folder of pictures that belong to those of a folder")
    if root.resolve().is_relative_to(pictures.root.resolve()):
        inside = root.resolve().relative_to(pictures.root.resolve())
        if not inside.parts:
            raise UsageError("--conditioning-data-dir is the folder of the pictures themselves")
        pictures = _without(pictures, lambda name: PurePosixPath(name).is_relative_to(inside))
    places: dict[str, int] = {}
    for place, item in enumerate(maps):
        stem = _stem(item.name)
        if stem in places:
            raise UsageError(f"{folder} holds {maps[places[stem]].name} and {item.name}: to which does {stem} belong?")
        places[stem] = place
    return pictures, Maps(maps, np.array([places.get(_stem(item.name), -1) for item in pictures], dtype=np.int64))


def with_maps_of_column(
    pictures: PictureSet, column: str | None, *, data: str, image_column: str | None, split: str
) -> tuple[PictureSet, Maps]:
    """Pair pictures with those that their rows name, or hold, in another column (`conditioning_image`).

    The first of the returned is the pictures without those that are maps alone. Raises UsageError where there is no
    such column.
    """
    name = column or MAP_COLUMN  # part of the maps' source, under which is remembered what was seen of them
    if isinstance(pictures, ParquetRows):
        rows = open_pictures(data, image_column=name, split=split)
        assert isinstance(rows, ParquetRows)
        return pictures, _by_name(pictures, replace(rows, source=f"{pictures.source} ({name})"), {})
    named: Mapping[str, str] = {}
    if isinstance(pictures, LooseFiles):
        named = named_in_tables(pictures, name, image_column=image_column, required=column is not None)
    if not named or not isinstance(pictures, LooseFiles):
        raise UsageError(
            f"{data} says nothing of conditioning pictures: no column {name!r} in a metadata.jsonl or parquet file; "
            "--conditioning-data-dir names a folder of them, --preprocessor makes them of the pictures"
        )
    names = sorted(set(named.values()))
    maps = LooseFiles(f"{pictures.source} ({name})", Items.of([Item(one, ()) for one in names]), root=pictures.root)
    alone = set(names) - {item.name for item in pictures}
    pictures = _without(pictures, alone.__contains__)
    return pictures, _by_name(pictures, maps, named)


def _by_name(pictures: PictureSet, maps: PictureSet, named: Mapping[str, str]) -> Maps:
    places = {maps[place].name: place for place in range(len(maps))}
    names = (pictures[index].name for index in range(len(pictures)))
    return Maps(maps, np.array([places.get(named.get(one, one), -1) for one in names], dtype=np.int64))


def _without(pictures: LooseFiles, are_maps: Callable[[str], bool]) -> LooseFiles:
    """Without what is said of maps: a map is no picture, neither a used nor a dropped one."""
    items = Items.of([item for item in pictures if not are_maps(item.name)], classes=pictures.classes)
    dropped = tuple(one for one in pictures.dropped if not are_maps(one.name))
    remarks = tuple(one for one in pictures.remarks if not are_maps(one.name))
    return replace(pictures, items=items, dropped=dropped, remarks=remarks)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
