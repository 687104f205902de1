"""Folders of latent files that `sdcli encode` wrote, with caption files or in class folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdcli.data.file_tree import Tree, split_by_folder
from sdcli.data.folder_listing import (
    Listing,
    base_of,
    caption_files,
    class_of,
    no_class,
    remark_other_splits,
    stem_of,
    with_caption_file,
)
from sdcli.data.records import Item, Items, Kind, ListedImages, captioned_by_class, file_stamp, read_file
from sdcli.data.unread import name_unread
from sdcli.errors import BadLatents, NotFound
from sdcli.vae.latent_files import LatentFile, read_latents, read_record
from sdcli.vae.latent_record import LatentRecord


@dataclass(frozen=True, eq=False)
class LatentFiles(ListedImages):
    """Latents that `sdcli encode` wrote, all by the same VAE."""

    root: Path = field(kw_only=True)
    places: np.ndarray = field(kw_only=True)
    """int32 [n]: the place of the latents in their file; -1 for a file with the latents of one image."""
    sizes: np.ndarray = field(kw_only=True)
    """int32 [n, 2]: width and height in pixels of the encoded images."""
    vae: str = field(kw_only=True)
    """The identity of the VAE's weights: `sha256:...` or `random:...`."""
    scaling_factor: float = field(kw_only=True)

    @property
    def kind(self) -> Kind:
        return "latents"

    def read(self, index: int) -> bytes:
        """The bytes of the whole file. Raises NotFound and BadImage."""
        return read_file(self._path(index))

    def read_latents(self, index: int) -> LatentFile:
        """The latents [1, C, h, w] of one image, finite float32. Raises NotFound and BadLatents."""
        path, place = self._path(index), max(0, int(self.places[index]))
        file = read_latents(path)
        if place >= len(file.latents):
            raise BadLatents(f"{path} holds fewer latents than when it was listed")
        return LatentFile(file.latents[place : place + 1], file.scaled, file.record)

    def stamp(self, index: int) -> str:
        """The file's size and time of change, and the place in it. Raises NotFound and BadImage."""
        return f"{file_stamp(self._path(index))}:{self.places[index]}"

    def _path(self, index: int) -> Path:
        name = self.items[index].name
        return self.root / (name if self.places[index] < 0 else name.rpartition(":")[0])


def open_latents(tree: Tree, *, source: str, caption_extension: str = ".txt", split: str = "train") -> LatentFiles:
    """The latent files of a folder, each with a caption file beside it, or in class folders.

    A file with the latents of several images has a caption file for each, named after that image.
    Raises BadLatents if they were made by different VAEs, UsageError for a split that does not exist.
    """
    chosen, below = split_by_folder(tree.latents, split=split, source=source)
    beside = caption_files(tree.others, caption_extension)
    listing = Listing(list(tree.dropped))
    records: dict[str, LatentRecord] = {}
    for name in chosen:
        try:
            record = read_record(tree.root / name)
        except (BadLatents, NotFound) as error:
            listing.drop(name, _without(str(error), tree.root / name))
            continue
        if record is None:
            listing.drop(name, "has no record of the VAE that made it; files that `sdcli encode` writes have one")
        elif not record.source:
            listing.drop(name, "has no record of the images that it was made from")
        else:
            records[name] = record
    makers = {(record.vae, record.scaling_factor): name for name, record in records.items()}
    if len(makers) > 1:
        first, second, *_ = sorted(makers.values())
        raise BadLatents(f"{source} holds latents of different VAEs, {first} and {second} for example")
    captioned = any(stem in beside for name, record in records.items() for stem in _caption_stems(name, record))
    label_of = no_class if captioned else class_of(list(records), below=below)
    items, places, sizes = [], [], []
    for name, record in records.items():
        for place, (stem, made_of) in enumerate(zip(_caption_stems(name, record), record.source, strict=True)):
            plain = Item(name if len(record.source) == 1 else f"{name}:{place}", (), label_of(name))
            item = with_caption_file(tree.root, plain, beside[stem], listing) if stem in beside else plain
            if item is not None:
                items.append(item)
                places.append(place if len(record.source) > 1 else -1)
                sizes.append((made_of.fitted_width, made_of.fitted_height))
    remark_other_splits(tree.latents, chosen, listing)
    read = {beside[stem] for name, record in records.items() for stem in _caption_stems(name, record) if stem in beside}
    others = {name.partition("/")[0] for name in set(tree.latents).difference(chosen)}
    name_unread(
        listing,
        root=tree.root,
        unread={name for name in {*tree.others, *tree.tables} - read if name.partition("/")[0] not in others},
        images=chosen,
        extension=caption_extension,
        without_captions=not captioned,
    )
    vae, scaling_factor = next(iter(makers), ("", 1.0))
    return LatentFiles(
        source,
        Items.of(captioned_by_class(items)),
        dropped=tuple(listing.dropped),
        remarks=tuple(listing.remarks),
        root=tree.root,
        places=np.array(places, dtype=np.int32),
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        vae=vae,
        scaling_factor=scaling_factor,
    )


def _caption_stems(name: str, record: LatentRecord) -> list[str]:
    """The paths, without suffix, of the caption files of a file's latents."""
    if len(record.source) == 1:
        return [stem_of(name)]
    folder = name[: -len(base_of(name))]
    return [folder + stem_of(base_of(made_of.name)) for made_of in record.source]


def _without(sentence: str, path: Path) -> str:
    """A sentence without the file's path at its start."""
    return sentence.removeprefix(f"{path} ").removeprefix(f"{path}: ")
