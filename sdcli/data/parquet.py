"""Images in parquet files, as Hugging Face's datasets writes them: local or streamed, read by row group."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdcli.data.records import (
    DroppedItem,
    Item,
    Items,
    ListedImages,
    Remark,
    UnusableEntry,
    captioned_by_class,
    captions_of_value,
    file_stamp,
    label_of_value,
    read_file,
)
from sdcli.data.tables import (
    CAPTION_COLUMNS,
    LABEL_COLUMN,
    class_names_of,
    feature_type,
    features_of,
    named_label,
    pick_column,
    plain_rows,
    pyarrow_modules,
)
from sdcli.errors import BadImage, NotFound, Offline, UsageError, first_line

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes", "pixel_values")
RETRY_PAUSES = (1.0, 4.0, 15.0)
"""Seconds before each new attempt to fetch from the network."""
HELD_BYTES = 256 * 1024**2
"""Row groups that are held in memory together, in bytes; at least one: a bounded shuffle reads a few at a time."""


@dataclass(frozen=True)
class ImageColumns:
    """The names of the columns, and the class names if labels are numbers."""

    image: str
    caption: str | None
    label: str | None
    class_names: tuple[str, ...] = ()
    other_images: tuple[str, ...] = ()
    """Further columns that the features declare as images, where nobody chose among them."""


@dataclass(frozen=True, eq=False)
class ParquetRows(ListedImages):
    """Images that are rows of parquet files; a block is a row group."""

    files: tuple[str, ...] = field(kw_only=True)
    """Local paths, or URLs that fsspec can open."""
    stamps: tuple[str, ...] = field(kw_only=True)
    """A string for each file that changes when the file does."""
    image_columns: tuple[str, ...] = field(kw_only=True)
    """The image column of each file."""
    rows: np.ndarray = field(kw_only=True)
    """int32 [n, 3]: file, row group in the file, row in the group."""
    remote: bool = field(default=False, kw_only=True)
    row_bytes: float = field(default=1.0, kw_only=True)
    """Mean size of a row's image in bytes."""
    group_rows: int = field(default=1, kw_only=True)
    """The rows of the largest row group."""
    groups: _Groups = field(default_factory=lambda: _Groups(), kw_only=True, repr=False)

    @property
    def streamed(self) -> bool:
        return True

    @property
    def shuffle_window(self) -> int | None:
        """As many rows as fit into the memory for row groups, less one group, which is read ahead."""
        return max(1, int(HELD_BYTES / self.row_bytes) - self.group_rows)

    def read(self, index: int) -> bytes:
        """The bytes in the image's cell.

        Raises BadImage, NotFound, and Offline if the network fails several times: an image that could not be fetched
        is not damaged, and must not be skipped as if it were.
        """
        name = self.items[index].name
        file, group, row = (int(number) for number in self.rows[index])
        cell = self._column(name, self.files[file], group, self.image_columns[file])[row].as_py()
        if isinstance(cell, dict):
            return self._bytes_of(cell, name, self.files[file])
        if not isinstance(cell, bytes):
            raise BadImage(f"{name}: holds no image")
        return cell

    def _column(self, name: str, file: str, group: int, column: str) -> Any:
        for pause in (*RETRY_PAUSES, None) if self.remote else (None,):
            try:
                return self.groups.column(file, group, column)
            except FileNotFoundError:
                raise NotFound(f"{name}: no file {file}") from None
            except Exception as error:  # pyarrow, fsspec and the network raise many kinds
                if not self.remote:
                    raise BadImage(f"{name}: cannot be read: {first_line(error)}") from None
                if pause is None:
                    raise Offline(f"{name}: cannot be fetched from {file}: {first_line(error)}") from None
                self.groups.forget(file)
                time.sleep(pause)
        raise AssertionError

    def _bytes_of(self, cell: Mapping[str, Any], name: str, file: str) -> bytes:
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        path = cell.get("path")
        if not path:
            raise BadImage(f"{name}: holds no image")
        folder = os.path.dirname(os.path.abspath(file))
        target = os.path.normpath(os.path.join(folder, path))
        if self.remote or os.path.isabs(path) or not target.startswith(os.path.join(folder, "")):
            raise BadImage(f"{name}: holds no image, only the path of one ({path})")
        return read_file(Path(target))

    def stamp(self, index: int) -> str:
        """The file's stamp and the row. Raises BadImage and NotFound."""
        file, group, row = (int(number) for number in self.rows[index])
        stamp = self.stamps[file] if self.remote else file_stamp(Path(self.files[file]))
        return f"{stamp}:{group}:{row}"


class _Groups:
    """A cache of the image columns of recent row groups and of open files. Each process has its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._columns: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[_Groups], tuple[()]]:
        return _Groups, ()

    def column(self, file: str, group: int, column: str) -> Any:
        """One row group's column, from memory or read."""
        if self._owner != os.getpid():  # forked: the parent's file handles share their position with ours
            self.__init__()  # type: ignore[misc]
        with self._lock:
            key = (file, group, column)
            if key not in self._columns:
                self._columns[key] = self._opened(file).read_row_group(group, columns=[column]).column(column)
                while len(self._columns) > 1 and sum(held.nbytes for held in self._columns.values()) > HELD_BYTES:
                    self._columns.popitem(last=False)
            self._columns.move_to_end(key)
            return self._columns[key]

    def forget(self, file: str) -> None:
        """Close a file, so that it is opened again: its connection may be broken."""
        with self._lock:
            self._files.pop(file, None)

    def _opened(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = open_parquet(file)
            if len(self._files) > 8:
                self._files.popitem(last=False)[1].close(force=True)
        self._files.move_to_end(file)
        return self._files[file]


def open_rows(
    files: Sequence[str],
    *,
    names: Sequence[str],
    source: str,
    stamps: Sequence[str],
    remote: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    features: Mapping[str, Any] | None = None,
    dropped: Sequence[DroppedItem] = (),
) -> ParquetRows:
    """List the rows of parquet files: captions and labels are read, images are not.

    `names` are shown to people. `features` are Hugging Face's, for files that do not contain them. A file that cannot
    be read is dropped. Raises UsageError for a missing column, and if pyarrow is not installed.
    """
    pyarrow_modules()
    items: list[Item] = []
    classes: set[str] = set()
    rows: list[tuple[int, int, int]] = []
    lost, remarks, image_columns, block = list(dropped), [], [], 0
    sizes: list[tuple[int, int]] = []
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        image_columns.append("")
        start, listed = len(items), []
        try:
            with open_parquet(path) as file:
                columns = _columns(file, name, image_column, caption_column, features or {})
                image_columns[-1] = columns.image
                classes |= set(columns.class_names)
                if columns.other_images:
                    others = ", ".join(columns.other_images)
                    remarks.append(
                        Remark(
                            name,
                            f"has images in {columns.image} and {others}; {columns.image} is used, unless "
                            "--image-column names another",
                        )
                    )
                wanted = [column for column in (columns.caption, columns.label) if column is not None]
                if not wanted:
                    present = ", ".join(file.schema_arrow.names)
                    text = (
                        f"has no column {' or '.join(CAPTION_COLUMNS)}, but {present}; --caption-column names another"
                    )
                    remarks.append(Remark(name, text))
                row = 0
                for group in range(file.num_row_groups):
                    count, size = _group_size(file.metadata.row_group(group), columns.image)
                    sizes.append((count, size))
                    cells = plain_rows(file.read_row_group(group, columns=wanted)) if wanted else [{}] * count
                    for place, values in enumerate(cells):
                        try:
                            items.append(_item(f"{name}:{row}", values, columns, block=block + group))
                            listed.append((number, group, place))
                        except UnusableEntry as problem:
                            lost.append(DroppedItem(f"{name}:{row}", str(problem)))
                        row += 1
                block += file.num_row_groups
            rows += listed
        except UsageError:
            raise
        except Exception as error:  # pyarrow and fsspec raise many kinds for damaged or missing files
            del items[start:]
            lost.append(DroppedItem(name, f"is a parquet file that cannot be read: {first_line(error)}"))
    return ParquetRows(
        source,
        Items.of(captioned_by_class(items), classes=classes),
        dropped=tuple(lost),
        remarks=tuple(remarks),
        files=tuple(files),
        stamps=tuple(stamps),
        image_columns=tuple(image_columns),
        rows=np.array(rows, dtype=np.int32).reshape(-1, 3),
        remote=remote,
        row_bytes=max(1.0, sum(size for _, size in sizes) / max(1, len(items))),
        group_rows=max((count for count, _ in sizes), default=1),
    )


def open_parquet(path: str) -> Any:
    """A ParquetFile of a local path, or of a URL through fsspec, which fetches only the parts that are read."""
    _, parquet = pyarrow_modules()
    if "://" not in path:
        return parquet.ParquetFile(path)
    import fsspec  # type: ignore[import-untyped]

    return parquet.ParquetFile(fsspec.open(path, "rb").open(), pre_buffer=True)


def _group_size(group: Any, column: str) -> tuple[int, int]:
    """The rows of a row group, and the bytes of one of its columns."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return group.num_rows, sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
    )


def _item(name: str, values: Mapping[str, Any], columns: ImageColumns, *, block: int) -> Item:
    captions = captions_of_value(values.get(columns.caption)) if columns.caption is not None else ()
    label = values.get(columns.label) if columns.label is not None else None
    return Item(name, captions, label_of_value(named_label(label, columns.class_names)), block)


def _columns(
    file: Any, name: str, image_column: str | None, caption_column: str | None, features: Mapping[str, Any]
) -> ImageColumns:
    """The columns to use: those given, else by the features, else by usual names and types."""
    schema = file.schema_arrow
    features = {**features, **features_of(schema)}
    declared = [column for column in schema.names if feature_type(features.get(column)) == "Image"]
    typed = [field.name for field in schema if _holds_bytes(field.type)]
    known = [column for column in IMAGE_COLUMNS if column in declared]
    usual = [*known, *declared, *(column for column in IMAGE_COLUMNS if column in typed)]
    usual += typed if len(typed) == 1 else []
    image = pick_column(image_column, usual, schema.names, source=name, what="--image-column")
    if image is None:
        raise UsageError(
            f"{name} has no column that is recognized as images (it has {', '.join(schema.names)}); "
            "name it with --image-column"
        )
    if image not in typed:
        raise UsageError(f"{name}: its column {image!r} holds {schema.field(image).type}, not the bytes of images")
    named = {column: features[column] for column in schema.names if feature_type(features.get(column)) == "ClassLabel"}
    label = LABEL_COLUMN if LABEL_COLUMN in schema.names else next(iter(named), None) if len(named) == 1 else None
    class_names = class_names_of(named.get(label))
    return ImageColumns(
        image=image,
        caption=pick_column(caption_column, CAPTION_COLUMNS, schema.names, source=name, what="--caption-column"),
        label=label,
        class_names=class_names,
        other_images=tuple(column for column in declared if column != image) if image_column is None else (),
    )


def _holds_bytes(kind: Any) -> bool:
    arrow, _ = pyarrow_modules()
    types = arrow.types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
