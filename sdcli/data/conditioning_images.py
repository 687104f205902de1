"""Images and the maps that belong to them: by a column of their table or rows, or by their names in two folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from sdcli.data.folders import LooseFiles, named_in_tables
from sdcli.data.parquet import ParquetRows
from sdcli.data.records import ImageSet, Item, Items
from sdcli.data.sources import open_images
from sdcli.errors import NotFound, UsageError
from sdcli.io.files import expanded

MAP_COLUMN = "conditioning_image"
"""What diffusers' scripts call the column, and Hugging Face's data sets for ControlNets have."""


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of an image set, in the order of its images."""

    listed: ImageSet
    """All maps there are, in an order of their own."""
    places: np.ndarray
    """int64 [n]: where in `listed` the map of each image is; -1 where there is none."""

    def __getitem__(self, index: int) -> Item:
        return self.listed[int(self.places[index])]

    def read(self, index: int) -> bytes:
        """The bytes of an image's map. Raises BadImage, NotFound and Offline."""
        return self.listed.read(int(self.places[index]))


def with_maps_of_folder(images: ImageSet, folder: str) -> tuple[ImageSet, Maps]:
    """Pair images in folders with the images of another folder that have the same names, up to the suffix.

    The first of the returned is the images without those that lie in that folder themselves. Raises NotFound, and
    UsageError where the names leave open what belongs together.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise NotFound(f"there is no folder {folder} (--conditioning-data-dir)")
    maps = open_images(root, split="all")
    if not isinstance(images, LooseFiles) or not isinstance(maps, LooseFiles):
        raise UsageError("--conditioning-data-dir is a folder of pictures that belong to those of a folder")
    if root.resolve().is_relative_to(images.root.resolve()):
        inside = root.resolve().relative_to(images.root.resolve())
        if not inside.parts:
            raise UsageError("--conditioning-data-dir is the folder of the images themselves")
        images = _without(images, lambda name: PurePosixPath(name).is_relative_to(inside))
    places: dict[str, int] = {}
    for place, item in enumerate(maps):
        stem = _stem(item.name)
        if stem in places:
            raise UsageError(f"{folder} holds {maps[places[stem]].name} and {item.name}: to which does {stem} belong?")
        places[stem] = place
    return images, Maps(maps, np.array([places.get(_stem(item.name), -1) for item in images], dtype=np.int64))


def with_maps_of_column(
    images: ImageSet, column: str | None, *, data: str, image_column: str | None, split: str
) -> tuple[ImageSet, Maps]:
    """Pair images with those that their rows name, or hold, in another column (`conditioning_image`).

    The first of the returned is the images without those that are maps alone. Raises UsageError where there is no
    such column.
    """
    name = column or MAP_COLUMN  # part of the maps' source, under which is remembered what was seen of them
    if isinstance(images, ParquetRows):
        rows = open_images(data, image_column=name, split=split)
        assert isinstance(rows, ParquetRows)
        return images, _by_name(images, replace(rows, source=f"{images.source} ({name})"), {})
    named: Mapping[str, str] = {}
    if isinstance(images, LooseFiles):
        named = named_in_tables(images, name, image_column=image_column, required=column is not None)
    if not named or not isinstance(images, LooseFiles):
        raise UsageError(
            f"{data} says nothing of conditioning images: no column {name!r} in a metadata.jsonl or parquet file; "
            "--conditioning-data-dir names a folder of them, --preprocessor makes them of the pictures"
        )
    names = sorted(set(named.values()))
    maps = LooseFiles(f"{images.source} ({name})", Items.of([Item(one, ()) for one in names]), root=images.root)
    alone = set(names) - {item.name for item in images}
    images = _without(images, alone.__contains__)
    return images, _by_name(images, maps, named)


def _by_name(images: ImageSet, maps: ImageSet, named: Mapping[str, str]) -> Maps:
    places = {maps[place].name: place for place in range(len(maps))}
    names = (images[index].name for index in range(len(images)))
    return Maps(maps, np.array([places.get(named.get(one, one), -1) for one in names], dtype=np.int64))


def _without(images: LooseFiles, are_maps: Callable[[str], bool]) -> LooseFiles:
    """Without what is said of maps: a map is no image, neither a used nor a dropped one."""
    items = Items.of([item for item in images if not are_maps(item.name)], classes=images.classes)
    dropped = tuple(one for one in images.dropped if not are_maps(one.name))
    remarks = tuple(one for one in images.remarks if not are_maps(one.name))
    return replace(images, items=items, dropped=dropped, remarks=remarks)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
