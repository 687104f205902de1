"""Conditioning images (maps) for ControlNet training: paired by a table column, or by equal names in two folders."""

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
"""The column's name in diffusers' scripts and in Hugging Face's data sets for ControlNets."""


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of an image set, in the order of its images."""

    listed: ImageSet
    """All maps, in their own order."""
    places: np.ndarray
    """int64 [n]: the place in `listed` of each image's map; -1 for images without one."""

    def __getitem__(self, index: int) -> Item:
        return self.listed[int(self.places[index])]

    def read(self, index: int) -> bytes:
        """The bytes of an image's map. Raises BadImage, NotFound and Offline."""
        return self.listed.read(int(self.places[index]))


def with_maps_of_folder(images: ImageSet, folder: str) -> tuple[ImageSet, Maps]:
    """Pair images in folders with the images of another folder that have the same names, up to the suffix.

    The returned image set leaves out images in that folder. Raises NotFound, and UsageError if the pairing is
    ambiguous.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise NotFound(f"there is no folder {folder} (--conditioning-data-dir)")
    maps = open_images(root, split="all")
    if not isinstance(images, LooseFiles) or not isinstance(maps, LooseFiles):
        raise UsageError("--conditioning-data-dir and the training data must both be folders of images")
    if root.resolve().is_relative_to(images.root.resolve()):
        inside = root.resolve().relative_to(images.root.resolve())
        if not inside.parts:
            raise UsageError("--conditioning-data-dir is the folder of the training images itself")
        images = _without(images, lambda name: PurePosixPath(name).is_relative_to(inside))
    places: dict[str, int] = {}
    for place, item in enumerate(maps):
        stem = _stem(item.name)
        if stem in places:
            both = f"{maps[places[stem]].name} and {item.name}"
            raise UsageError(f"{folder} holds both {both}, so the map of {stem} is ambiguous")
        places[stem] = place
    return images, Maps(maps, np.array([places.get(_stem(item.name), -1) for item in images], dtype=np.int64))


def with_maps_of_column(
    images: ImageSet, column: str | None, *, data: str, image_column: str | None, split: str
) -> tuple[ImageSet, Maps]:
    """Pair images with those that their rows name or contain in another column (`conditioning_image`).

    The returned image set leaves out images that are only maps. Raises UsageError if there is no such column.
    """
    name = column or MAP_COLUMN  # part of the maps' source, by which their facts are stored
    if isinstance(images, ParquetRows):
        rows = open_images(data, image_column=name, split=split)
        assert isinstance(rows, ParquetRows)
        return images, _by_name(images, replace(rows, source=f"{images.source} ({name})"), {})
    named: Mapping[str, str] = {}
    if isinstance(images, LooseFiles):
        named = named_in_tables(images, name, image_column=image_column, required=column is not None)
    if not named or not isinstance(images, LooseFiles):
        raise UsageError(
            f"{data} names no conditioning images: there is no column {name!r} in a metadata.jsonl or parquet file; "
            "give a folder of them with --conditioning-data-dir, or compute them with --preprocessor"
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
    """The images that are not maps; items dropped and remarks about maps are left out as well.

    Where only one folder is left, its name is no class and no caption, as in folders that hold nothing else.
    """
    left = [item for item in images if not are_maps(item.name)]
    classes = {item.label for item in left}
    if len(classes) == 1 and len(images.classes) > 1 and all(item.captions == (item.label,) for item in left):
        left = [replace(item, captions=(), label=None) for item in left]
    items = Items.of(left, classes=() if len(classes) == 1 else images.classes)
    dropped = tuple(one for one in images.dropped if not are_maps(one.name))
    remarks = tuple(one for one in images.remarks if not are_maps(one.name))
    return replace(images, items=items, dropped=dropped, remarks=remarks)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
