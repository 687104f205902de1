"""Folders of images: with a metadata table, with caption files, or in class folders."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from sdcli.data.file_tree import Tree, scan, split_by_folder
from sdcli.data.folder_listing import (
    Listing,
    base_of,
    caption_files,
    class_of,
    no_class,
    other_caption_files,
    stem_of,
    with_caption_file,
)
from sdcli.data.records import (
    Item,
    Items,
    ListedImages,
    UnusableEntry,
    captioned_by_class,
    file_stamp,
    read_file,
    without_repeats,
)
from sdcli.data.tables import TABLE_NAMES, ImageRow, Table, read_table
from sdcli.errors import UsageError


@dataclass(frozen=True, eq=False)
class LooseFiles(ListedImages):
    """Images that are single files."""

    root: Path = field(kw_only=True)

    def read(self, index: int) -> bytes:
        """The image's bytes. Raises NotFound and BadImage."""
        return read_file(self.root / self.items[index].name)

    def stamp(self, index: int) -> str:
        """The file's size and time of change. Raises NotFound and BadImage."""
        return file_stamp(self.root / self.items[index].name)


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
    beside = caption_files(tree.others, caption_extension)
    if tables and any(table.has_captions for table in tables.values()) and caption_column is None:
        both = [name for name in chosen if stem_of(name) in beside]
        if both:
            raise UsageError(
                f"{source} has captions both in {next(iter(tables))} and in {len(both)} {caption_extension} files "
                f"({beside[stem_of(both[0])]}): choose the table with --caption-column, or remove it to use the files"
            )
    if not tables and (image_column is not None or caption_column is not None):
        column = "--image-column" if image_column is not None else "--caption-column"
        raise UsageError(f"{column} needs a metadata table, and {source} has no {', '.join(TABLE_NAMES)}")
    listing = Listing(list(tree.dropped))
    if tables:
        items = _listed_in_tables(tree, chosen, tables, beside, listing)
    else:
        items = list(_listed_by_files(tree, chosen, beside, listing, extension=caption_extension, below=below))
    items = captioned_by_class(items)
    return LooseFiles(
        source, Items.of(items), root=tree.root, dropped=tuple(listing.dropped), remarks=tuple(listing.remarks)
    )


def _tables_of(
    tree: Tree, chosen: Sequence[str], *, image_column: str | None, caption_column: str | None
) -> dict[str, Table]:
    """The metadata tables in the chosen images' folders or above them. Raises UsageError and BadImage."""
    folders = {str(above) for name in chosen for above in PurePosixPath(name).parents}
    names = [name for name in tree.tables if str(PurePosixPath(name).parent) in folders]
    for folder, count in Counter(str(PurePosixPath(name).parent) for name in names).items():
        if count > 1:
            both = [name for name in names if str(PurePosixPath(name).parent) == folder]
            raise UsageError(f"{tree.root} has both {' and '.join(both)}; keep one of them")
    return {
        name: read_table(tree.root / name, name=name, image_column=image_column, caption_column=caption_column)
        for name in names
    }


def named_in_tables(images: LooseFiles, column: str, *, image_column: str | None, required: bool) -> dict[str, str]:
    """Image -> the image that its row names in another column, as paths relative to the set's root.

    Empty if no table has such a column and it is not `required`. Raises UsageError and BadImage.
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
            with contextlib.suppress(UnusableEntry):  # reported when the images are listed and the maps decoded
                target = other_of.get(row.place)
                found.update(
                    {} if target is None else {_target(folder, row.file, known): _target(folder, target, known)}
                )
    return found


def _listed_in_tables(
    tree: Tree, chosen: Sequence[str], tables: dict[str, Table], beside: dict[str, str], listing: Listing
) -> list[Item]:
    """The images that rows name, in the order of their names; several rows of one image are alternatives."""
    from_files = not any(table.has_captions for table in tables.values())
    rows: dict[str, list[ImageRow]] = {}
    wanted, known = set(chosen), set(tree.images)
    for name, table in tables.items():
        listing.dropped += table.dropped
        folder = PurePosixPath(name).parent
        for row in table.rows:
            try:
                target = _target(folder, row.file, known)
            except UnusableEntry as problem:
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
        if item is not None and from_files and stem_of(image) in beside:
            item = with_caption_file(tree.root, item, beside[stem_of(image)], listing)
        items += [item] if item is not None else []
    return items


def _item_of_rows(image: str, rows: Sequence[ImageRow], tables: str, listing: Listing) -> Item | None:
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
    """The path of the file that a row names, relative to the root. Raises UnusableEntry if it is outside the folder."""
    for spelled in (file, unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)):
        for path in (spelled, spelled.replace("\\", "/")):
            if path.startswith("/") or PureWindowsPath(path).anchor:
                raise UnusableEntry("lies outside the folder")
            joined = os.path.normpath(folder / path).replace(os.sep, "/")
            if joined == ".." or joined.startswith("../"):
                raise UnusableEntry("lies outside the folder")
            if joined in known:
                return joined
    return os.path.normpath(folder / file).replace(os.sep, "/")


def _listed_by_files(
    tree: Tree, chosen: Sequence[str], beside: dict[str, str], listing: Listing, *, extension: str, below: int
) -> Iterator[Item]:
    captioned = any(stem_of(name) in beside for name in chosen)
    label_of = no_class if captioned else class_of(chosen, below=below)
    elsewhere = other_caption_files(tree.others, extension)
    owners: dict[str, str] = {}
    for name in chosen:
        stem = stem_of(name)
        item = Item(name, (), label_of(name))
        if stem in beside:
            if stem in owners:
                listing.drop(name, f"has the same name as {base_of(owners[stem])}, to which the caption belongs")
                continue
            owners[stem] = name
            item_with = with_caption_file(tree.root, item, beside[stem], listing)
            if item_with is None:
                continue
            item = item_with
        elif stem in elsewhere:
            suffix = elsewhere[stem]
            text = f"has no {extension} caption, but a {suffix} file, which --caption-extension {suffix} would read"
            listing.remark(name, text, loses=True)
        yield item
