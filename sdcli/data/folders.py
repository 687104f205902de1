"""Folders of images: with a metadata table, with caption files, or in class folders."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
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
    remark_other_splits,
    stem_of,
    with_caption_file,
)
from sdcli.data.kohya import class_of_kohya, kohya_folders, remark_folders, repeats_of
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
from sdcli.data.tables import CAPTION_COLUMNS, TABLE_NAMES, ImageRow, Table, read_table
from sdcli.data.unread import name_unread
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
        items = captioned_by_class(_listed_in_tables(tree, chosen, tables, beside, listing))
    else:
        items = _listed_by_files(tree, chosen, beside, listing, extension=caption_extension, below=below)
    remark_other_splits(tree.images, chosen, listing)
    captioned = next((name for name, table in tables.items() if table.has_captions), None)
    name_unread(
        listing,
        root=tree.root,
        unread=_unread(tree, chosen, tables, () if captioned else beside.values(), listing),
        images=chosen,
        extension=caption_extension,
        table=captioned,
        without_captions=captioned is None and not all(item.captions and item.label is None for item in items),
    )
    for name in tree.hidden:
        listing.remark(name, "is hidden, since its name begins with a dot, and is not used")
    return LooseFiles(
        source, Items.of(items), root=tree.root, dropped=tuple(listing.dropped), remarks=tuple(listing.remarks)
    )


def _unread(
    tree: Tree, chosen: Sequence[str], tables: Collection[str], captions: Iterable[str], listing: Listing
) -> set[str]:
    """The files that are neither images nor read tables nor `captions` of images, without those of other splits."""
    stems, known = {stem_of(name) for name in chosen}, {remark.name for remark in listing.remarks}
    read = {name for name in captions if stem_of(name) in stems} | {*listing.read, *known, *tables}
    others = {name.partition("/")[0] for name in set(tree.images).difference(chosen)}
    return {name for name in {*tree.others, *tree.tables} - read if name.partition("/")[0] not in others}


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

    Empty if no table has such a column and it is not `required`. Raises BadImage, and UsageError, also for an image
    whose rows name different ones: their captions are alternatives, and any of them would go with one map.
    """
    tree = scan(images.root)
    known = set(tree.images)
    found: dict[str, str] = {}
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
                if row.place not in other_of:
                    continue
                image = _target(tree.root, folder, row.file, known)
                target = _target(tree.root, folder, other_of[row.place], known)
                if found.setdefault(image, target) != target:
                    raise UsageError(
                        f"{name} names both {found[image]} and {target} as {column} of {image}; an image has one: "
                        "remove a row, or copy the image under another name"
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
                target = _target(tree.root, folder, row.file, known)
            except UnusableEntry as problem:
                listing.drop(row.file, f"{problem} ({name} {row.place})")
                continue
            if target in wanted:
                rows.setdefault(target, []).append(row)
            elif target not in known:
                listing.drop(row.file, f"is listed in {name} ({row.place}), but {_why_not(tree, folder, target)}")
    items = []
    for image in chosen:
        item = _item_of_rows(image, rows.get(image, []), " or ".join(tables), listing)
        if item is not None and from_files and stem_of(image) in beside:
            item = with_caption_file(tree.root, item, beside[stem_of(image)], listing)
        items += [item] if item is not None else []
    if not any(item.captions for item in items):
        for name, table in tables.items():
            if table.rows and not table.has_captions:
                usual, columns = " or ".join(CAPTION_COLUMNS), ", ".join(table.columns)
                text = f"has no column {usual}, but {columns}; --caption-column names the one with captions"
                listing.remark(name, text, loses=not any(item.label for item in items))
    return items


def _item_of_rows(image: str, rows: Sequence[ImageRow], tables: str, listing: Listing) -> Item | None:
    if not rows:
        listing.drop(image, f"has no row in {tables}")
        return None
    problem = next((f"{row.problem}, {tables} {row.place}" for row in rows if row.problem), None)
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


def _why_not(tree: Tree, folder: PurePosixPath, target: str) -> str:
    """Why a file that a table lists is no image of the set."""
    if os.path.lexists(tree.root / target):
        return "it is no image that is read"
    if str(folder) == ".":
        return "there is no such file"
    return f"there is no {target}: names in it are relative to its folder {folder}/"


def _target(root: Path, folder: PurePosixPath, file: str, known: set[str]) -> str:
    """The path of the file that a row names, relative to the root. Raises UnusableEntry if it is outside the folder."""
    for spelled in (file, unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file)):
        for path in (spelled, spelled.replace("\\", "/")):
            if path.startswith("/"):
                joined = os.path.relpath(path, os.path.abspath(root)).replace(os.sep, "/")
            elif PureWindowsPath(path).anchor:
                raise UnusableEntry("lies outside the folder, as a path of Windows does")
            else:
                joined = os.path.normpath(folder / path).replace(os.sep, "/")
            if joined == ".." or joined.startswith("../"):
                raise UnusableEntry("lies outside the folder")
            if joined in known:
                return joined
    return joined


def _listed_by_files(
    tree: Tree, chosen: Sequence[str], beside: dict[str, str], listing: Listing, *, extension: str, below: int
) -> list[Item]:
    """The images with their caption files or, without any, the names of their classes."""
    elsewhere = other_caption_files(tree.others, extension)
    captioned = any(stem_of(name) in beside for name in chosen)
    lost = any(stem_of(name) in elsewhere for name in chosen)  # captions, which are not replaced by the folders' names
    kohya = kohya_folders(chosen, below=below, captioned=captioned or lost)
    repeats = repeats_of(kohya, below=below)
    label_of = no_class if captioned or lost else class_of(chosen, below=below)
    if kohya and not captioned and not lost:
        label_of = class_of_kohya(kohya, below=below)
    remark_folders(chosen, kohya, listing, captioned=captioned or lost, below=below)
    items: list[Item] = []
    owners: dict[str, str] = {}
    for name in chosen:
        stem = stem_of(name)
        plain = Item(name, (), label_of(name), repeats=repeats(name))
        item: Item | None = plain
        if stem in beside:
            if stem in owners:
                listing.drop(name, f"has the same name as {base_of(owners[stem])}, to which the caption belongs")
                continue
            owners[stem] = name
            item = with_caption_file(tree.root, plain, beside[stem], listing)
        elif stem in elsewhere:
            file = elsewhere[stem]
            suffix = PurePosixPath(file).suffix
            text = f"has no {extension} caption, but a {suffix} file, which --caption-extension {suffix} would read"
            listing.remark(name, text, loses=True)
            listing.read.add(file)
        items += [item] if item is not None else []
    return captioned_by_class(items)
