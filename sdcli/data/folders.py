"""Loose files in folders: images with a metadata table, with caption files or in class folders; latent files."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from sdcli.data.records import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    Dropped,
    Item,
    Items,
    Kind,
    Listed,
    Remark,
    Unusable,
    captioned_by_class,
    captions_of_file,
    file_stamp,
    read_file,
    without_repeats,
)
from sdcli.data.tables import TABLE_NAMES, Row, Table, read_table
from sdcli.errors import BadImage, BadLatents, NotFound, UsageError
from sdcli.vae.latent_files import LatentFile, LatentRecord, read_latents, read_record

LATENT_SUFFIXES = frozenset({".safetensors", ".latent"})
CAPTION_LIKE = frozenset({".txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".prompt"})
"""What caption files are called; one in an extension that was not asked for is worth a remark."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> what its folder may be called, as in Hugging Face's datasets."""
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
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, eq=False)
class LooseFiles(Listed):
    """Images that are files of their own."""

    root: Path = field(kw_only=True)

    def read(self, index: int) -> bytes:
        """The image's bytes. Raises NotFound and BadImage."""
        return read_file(self.root / self.items[index].name)

    def stamp(self, index: int) -> str:
        """The file's size and time of change. Raises NotFound and BadImage."""
        return file_stamp(self.root / self.items[index].name)


@dataclass(frozen=True, eq=False)
class LatentFiles(Listed):
    """Latents that `sdcli encode` wrote, all by the same VAE."""

    root: Path = field(kw_only=True)
    places: np.ndarray = field(kw_only=True)
    """int32 [n]: which of the latents in its file; -1 where the file holds one."""
    sizes: np.ndarray = field(kw_only=True)
    """int32 [n, 2]: width and height in pixels of what was encoded."""
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


# Walking the tree


def scan(root: Path) -> Tree:
    """All files below a folder; links are followed, but never round in a circle. Raises NotFound."""
    kinds: dict[str, list[str]] = {name: [] for name in ("images", "latents", "tars", "parquets", "tables")}
    others: set[str] = set()
    dropped: list[Dropped] = []
    for name in sorted(_walk(root, dropped)):
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
            dropped.append(Dropped(name, f"is of a kind that is not read ({suffix}); a PNG or JPEG copy would be"))
        else:
            others.add(name)
    found = {kind: tuple(names) for kind, names in kinds.items()}
    return Tree(root, **found, others=frozenset(others), dropped=tuple(sorted(dropped, key=lambda one: one.name)))


def _walk(root: Path, dropped: list[Dropped]) -> Iterator[str]:
    """Relative paths of the ordinary files, in no order."""
    pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    while pending:
        folder, below, above = pending.pop()
        try:
            facts = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            if not below:
                raise NotFound(f"cannot read the folder {root}: {error.strerror}") from None
            dropped.append(Dropped(below.rstrip("/"), f"is a folder that cannot be read: {error.strerror}"))
            continue
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:  # a link to a folder that it lies in
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            name = below + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself, or through a file
                dropped.append(Dropped(name, f"cannot be looked at: {error.strerror}"))
                continue
            if is_folder:
                pending.append((entry.path, f"{name}/", above | {identity}))
            elif is_file:
                yield name
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES | LATENT_SUFFIXES | {".tar", ".parquet"}:
                dropped.append(Dropped(name, "is a link to nothing" if entry.is_symlink() else "is no ordinary file"))


# Splits


def split_by_folder(names: Sequence[str], *, split: str, source: str) -> tuple[tuple[str, ...], int]:
    """Those of the relative paths that belong to a split, and how many leading folders (0 or 1) are splits.

    Without split folders everything is `train`.

    Sub-folders are splits where all of them are called so. Raises UsageError where only some are, or the split that
    was asked for is not there.
    """
    tops = sorted({name.partition("/")[0] if "/" in name else "" for name in names})
    named = {top: canonical for top in tops if (canonical := split_called(top)) is not None}
    if not named or (split == ALL_SPLITS and len(named) < len(tops)):
        _check_split(split, {"train"}, source)
        return tuple(names), 0
    if len(named) < len(tops):
        others = ", ".join(top or "files outside of folders" for top in tops if top not in named)
        raise UsageError(
            f"{source} has {', '.join(named)} beside {others}: are they splits, or classes? Give {source}/"
            f"{next(iter(named))} for one split, or --split {ALL_SPLITS} for everything"
        )
    _check_split(split, set(named.values()), source)
    wanted = set(named.values()) if split == ALL_SPLITS else {split_called(split)}
    return tuple(name for name in names if named[name.partition("/")[0]] in wanted), 1


def split_by_name(names: Sequence[str], *, split: str, source: str) -> tuple[tuple[str, ...], tuple[Dropped, ...]]:
    """Those of some shards or parquet files that belong to a split, by their folder or a word of their name.

    Where no name says anything, all are `train`; else those that say nothing are dropped. Raises UsageError.
    """
    said = {name: _split_in_path(name) for name in names}
    if split == ALL_SPLITS or not any(said.values()):
        _check_split(split, {"train"}, source)
        return tuple(names), ()
    _check_split(split, {name for name in said.values() if name}, source)
    silent = (Dropped(name, "belongs to no split, while other files do") for name in names if said[name] is None)
    return tuple(name for name in names if said[name] == split_called(split)), tuple(silent)


def split_called(name: str) -> str | None:
    """The split that a word means."""
    return next((split for split, words in SPLITS.items() if name.lower() in words), None)


def _split_in_path(name: str) -> str | None:
    words = PurePosixPath(name).with_suffix("").as_posix()
    for separator in "/-_. ":
        words = words.replace(separator, "\n")
    return next((split for word in words.split("\n") if (split := split_called(word.rstrip("0123456789")))), None)


def _check_split(split: str, there: set[str], source: str) -> None:
    if split != ALL_SPLITS and split_called(split) not in there:
        raise UsageError(f"{source} has no split {split!r}; it has {', '.join(sorted(there))} (--split)")


# Images


def open_folder(
    tree: Tree,
    *,
    source: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_extension: str = ".txt",
    split: str = "train",
) -> LooseFiles:
    """The images of a folder, with captions from its metadata tables, from caption files, or from class folders."""
    chosen, below = split_by_folder(tree.images, split=split, source=source)
    tables = _tables_of(tree, chosen, image_column=image_column, caption_column=caption_column)
    beside = _caption_files(tree.others, caption_extension)
    if tables and any(table.has_captions for table in tables.values()) and caption_column is None:
        both = [name for name in chosen if _stem(name) in beside]
        if both:
            raise UsageError(
                f"{source} has captions in {next(iter(tables))} and in {len(both)} {caption_extension} files "
                f"({beside[_stem(both[0])]}): --caption-column chooses the table; without the table the files are taken"
            )
    if not tables and (image_column is not None or caption_column is not None):
        column = "--image-column" if image_column is not None else "--caption-column"
        raise UsageError(f"{source} has no {', '.join(TABLE_NAMES)} that {column} could speak of")
    listing = _Listing(list(tree.dropped))
    if tables:
        items = _listed_in_tables(tree, chosen, tables, beside, listing)
    else:
        items = list(_listed_by_files(tree, chosen, beside, listing, extension=caption_extension, below=below))
    items = captioned_by_class(items)
    return LooseFiles(
        source, Items.of(items), root=tree.root, dropped=tuple(listing.dropped), remarks=tuple(listing.remarks)
    )


@dataclass
class _Listing:
    """What is found on the way."""

    dropped: list[Dropped] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(Dropped(name, reason))

    def remark(self, name: str, text: str, *, loses: bool = False) -> None:
        self.remarks.append(Remark(name, text, loses))


def _tables_of(
    tree: Tree, chosen: Sequence[str], *, image_column: str | None, caption_column: str | None
) -> dict[str, Table]:
    """The metadata tables that stand in the chosen images' folders or above them. Raises UsageError, BadImage."""
    folders = {str(above) for name in chosen for above in PurePosixPath(name).parents}
    names = [name for name in tree.tables if str(PurePosixPath(name).parent) in folders]
    for folder, count in Counter(str(PurePosixPath(name).parent) for name in names).items():
        if count > 1:
            both = [name for name in names if str(PurePosixPath(name).parent) == folder]
            raise UsageError(f"{tree.root} has {' and '.join(both)}; keep the one that is meant")
    return {
        name: read_table(tree.root / name, name=name, image_column=image_column, caption_column=caption_column)
        for name in names
    }


def named_in_tables(images: LooseFiles, column: str, *, image_column: str | None, required: bool) -> dict[str, str]:
    """Image -> the image that its row names in another column, as paths relative to the set's root.

    Empty where no table has such a column and it is not `required`. Raises UsageError and BadImage.
    """
    tree = scan(images.root)
    known, found = set(tree.images), {}
    tables = _tables_of(tree, [item.name for item in images], image_column=image_column, caption_column=None)
    for name, own in tables.items():
        folder = PurePosixPath(name).parent
        try:
            others = read_table(tree.root / name, name=name, image_column=column, caption_column=None)
        except UsageError:
            if required:
                raise
            continue
        other_of = {row.place: row.file for row in others.rows}
        for row in own.rows:
            with contextlib.suppress(Unusable):  # listing the images, or looking at the maps, tells of it
                target = other_of.get(row.place)
                found.update(
                    {} if target is None else {_target(folder, row.file, known): _target(folder, target, known)}
                )
    return found


def _listed_in_tables(
    tree: Tree, chosen: Sequence[str], tables: dict[str, Table], beside: dict[str, str], listing: _Listing
) -> list[Item]:
    """The images that rows speak of, in the order of their names; several rows of one image are alternatives."""
    from_files = not any(table.has_captions for table in tables.values())
    rows: dict[str, list[Row]] = {}
    wanted, known = set(chosen), set(tree.images)
    for name, table in tables.items():
        listing.dropped += table.dropped
        folder = PurePosixPath(name).parent
        for row in table.rows:
            try:
                target = _target(folder, row.file, known)
            except Unusable as problem:
                listing.drop(row.file, f"{problem} ({name} {row.place})")
                continue
            if target in wanted:
                rows.setdefault(target, []).append(row)
            elif target not in known:
                there = os.path.lexists(tree.root / target)
                reason = "it is no image that is read" if there else "there is no such file"
                listing.drop(row.file, f"is listed in {name} ({row.place}), but {reason}")
    items = []
    for image in chosen:
        item = _item_of_rows(image, rows.get(image, []), " or ".join(tables), listing)
        if item is not None and from_files and _stem(image) in beside:
            item = _with_caption_file(tree.root, item, beside[_stem(image)], listing)
        items += [item] if item is not None else []
    return items


def _item_of_rows(image: str, rows: Sequence[Row], tables: str, listing: _Listing) -> Item | None:
    if not rows:
        listing.drop(image, f"has no row in {tables}")
        return None
    problem = next((row.problem for row in rows if row.problem), None)
    labels = {row.label for row in rows if row.label is not None}
    if problem is None and len(labels) > 1:
        problem = f"is listed as {' and as '.join(sorted(labels))}"
    if problem is not None:
        listing.drop(image, problem)
        return None
    if len(rows) > 1:
        listing.remark(image, "is listed in several rows; their captions are alternatives")
    captions = without_repeats(caption for row in rows for caption in row.captions)
    return Item(image, captions, next(iter(labels), None))


def _target(folder: PurePosixPath, file: str, known: set[str]) -> str:
    """The path that a row means, relative to the root. Raises Unusable for one that leads out of the folder."""
    for spelled in (file, unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)):
        for path in (spelled, spelled.replace("\\", "/")):
            if path.startswith("/") or PureWindowsPath(path).anchor:
                raise Unusable("lies outside the folder")
            joined = os.path.normpath(folder / path).replace(os.sep, "/")
            if joined == ".." or joined.startswith("../"):
                raise Unusable("lies outside the folder")
            if joined in known:
                return joined
    return os.path.normpath(folder / file).replace(os.sep, "/")


def _listed_by_files(
    tree: Tree, chosen: Sequence[str], beside: dict[str, str], listing: _Listing, *, extension: str, below: int
) -> Iterator[Item]:
    captioned = any(_stem(name) in beside for name in chosen)
    label_of = _no_class if captioned else _class_of(chosen, below=below)
    elsewhere = _other_caption_files(tree.others, extension)
    owners: dict[str, str] = {}
    for name in chosen:
        stem = _stem(name)
        item = Item(name, (), label_of(name))
        if stem in beside:
            if stem in owners:
                listing.drop(name, f"has the same name as {_base(owners[stem])}, to which the caption belongs")
                continue
            owners[stem] = name
            item_with = _with_caption_file(tree.root, item, beside[stem], listing)
            if item_with is None:
                continue
            item = item_with
        elif stem in elsewhere:
            suffix = elsewhere[stem]
            text = f"has no {extension} caption, but a {suffix} file, which --caption-extension {suffix} would read"
            listing.remark(name, text, loses=True)
        yield item


def _with_caption_file(root: Path, item: Item, file: str, listing: _Listing) -> Item | None:
    try:
        captions = captions_of_file(read_file(root / file))
    except Unusable as problem:
        listing.drop(item.name, str(problem))
        return None
    except (BadImage, NotFound) as error:
        listing.drop(item.name, f"its caption cannot be read: {error}")
        return None
    if not captions:
        listing.remark(item.name, "its caption file is empty", loses=True)
    return Item(item.name, captions, item.label)


def _class_of(names: Sequence[str], *, below: int) -> Callable[[str], str | None]:
    """How to find an image's class: the first folder in which the paths differ, as in torchvision's ImageFolder.

    `below` leading folders are splits. Where an image lies in no folder there are no classes at all.
    """
    folders = [name.split("/")[below:-1] for name in names]
    if not folders or not all(folders):
        return _no_class
    depth = 0
    while all(len(path) > depth + 1 for path in folders) and len({path[depth] for path in folders}) == 1:
        depth += 1
    return lambda name: name.split("/")[below + depth]


def _no_class(name: str) -> str | None:
    return None


def _caption_files(others: Iterable[str], extension: str) -> dict[str, str]:
    """Path without suffix -> the caption file of that name; `.TXT` counts as `.txt`."""
    found: dict[str, str] = {}
    for name in sorted(others, reverse=True):  # of both the one in small letters comes last, and stays
        if name.lower().endswith(extension.lower()):
            found[name[: -len(extension)]] = name
    return found


def _other_caption_files(others: Iterable[str], extension: str) -> dict[str, str]:
    """Path without suffix -> the suffix of what looks like a caption and is not asked for."""
    pairs = ((_stem(name), PurePosixPath(name).suffix) for name in sorted(others))
    return {stem: suffix for stem, suffix in pairs if suffix.lower() in CAPTION_LIKE - {extension.lower()}}


def _stem(name: str) -> str:
    base = name.rpartition("/")[2]
    suffix = PurePosixPath(base).suffix
    return name[: -len(suffix)] if suffix else name


def _base(name: str) -> str:
    return name.rpartition("/")[2]


# Latents


def open_latents(tree: Tree, *, source: str, caption_extension: str = ".txt", split: str = "train") -> LatentFiles:
    """The latent files of a folder, each with a caption file beside it, or in class folders.

    A file that holds several has a caption file for each image it was made of, named as that image was.
    Raises BadLatents where they were made by different VAEs, UsageError for a split that is not there.
    """
    chosen, below = split_by_folder(tree.latents, split=split, source=source)
    beside = _caption_files(tree.others, caption_extension)
    listing = _Listing(list(tree.dropped))
    records: dict[str, LatentRecord] = {}
    for name in chosen:
        try:
            record = read_record(tree.root / name)
        except (BadLatents, NotFound) as error:
            listing.drop(name, _without(str(error), tree.root / name))
            continue
        if record is None:
            listing.drop(name, "does not say by which VAE it was made; `sdcli encode` writes files that do")
        elif not record.source:
            listing.drop(name, "does not say of which images it was made")
        else:
            records[name] = record
    makers = {(record.vae, record.scaling_factor): name for name, record in records.items()}
    if len(makers) > 1:
        first, second, *_ = sorted(makers.values())
        raise BadLatents(f"{source} holds latents of different VAEs, {first} and {second} for example")
    captioned = any(stem in beside for name, record in records.items() for stem in _caption_stems(name, record))
    label_of = _no_class if captioned else _class_of(list(records), below=below)
    items, places, sizes = [], [], []
    for name, record in records.items():
        for place, (stem, made_of) in enumerate(zip(_caption_stems(name, record), record.source, strict=True)):
            plain = Item(name if len(record.source) == 1 else f"{name}:{place}", (), label_of(name))
            item = _with_caption_file(tree.root, plain, beside[stem], listing) if stem in beside else plain
            if item is not None:
                items.append(item)
                places.append(place if len(record.source) > 1 else -1)
                sizes.append((made_of.fitted_width, made_of.fitted_height))
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
    """Where the captions of a file's latents are looked for: a path without suffix for each."""
    if len(record.source) == 1:
        return [_stem(name)]
    folder = name[: -len(_base(name))]
    return [folder + _stem(_base(made_of.name)) for made_of in record.source]


def _without(sentence: str, path: Path) -> str:
    """A reason that follows the file's name, of a sentence that begins with it."""
    return sentence.removeprefix(f"{path} ").removeprefix(f"{path}: ")
