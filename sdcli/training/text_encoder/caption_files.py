"""Reads captions for text encoder training, from a file of captions or an image data set."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sdcli.data.file_tree import split_of_files
from sdcli.data.records import MAX_CAPTION_BYTES, DroppedItem, UnusableEntry, captions_of_value
from sdcli.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, holds_text, pick_column, plain_rows
from sdcli.encoders.tokenizer import END, START
from sdcli.errors import NotFound, UsageError
from sdcli.io.files import expanded
from sdcli.io.rows import CsvFile, Row, json_rows, text_lines
from sdcli.io.text import utf8_stream


@dataclass(frozen=True)
class Captions:
    """Texts in their order, in groups of alternatives: captions of one image, with the same meaning."""

    texts: tuple[str, ...]
    groups: tuple[int, ...]
    """The number of each text's group, from 0; the texts of a group are adjacent."""
    dropped: tuple[DroppedItem, ...] = ()

    @property
    def has_alternatives(self) -> bool:
        """Whether any group has several texts."""
        return bool(self.groups) and self.groups[-1] + 1 < len(self.groups)


@dataclass(frozen=True)
class _Row:
    """An entry of a file: its place, its caption or list of captions, and the image that it describes, if any."""

    name: str
    value: Any
    image: str | None = None


def read_captions(
    source: str | Path, *, caption_column: str | None = None, caption_extension: str = ".txt", split: str = "train"
) -> Captions:
    """Read captions from a .txt (one per line), .jsonl, .csv or .parquet file, or from a source of `open_images`.

    In tables the column is `caption_column`, else text or caption. A cell may hold a list of alternatives, and rows
    with the same image (file_name, image_path or image) are alternatives, too. Invalid rows are dropped with a reason;
    blank lines and repeats within a group are skipped. Raises NotFound, and UsageError if no caption is left.
    """
    path = expanded(source)
    one_file = path.is_file() or (not path.is_dir() and not re.search(r"[*?\[{]", str(source)))
    rows: Iterator[_Row | DroppedItem]
    match path.suffix.lower() if one_file else "":
        case ".txt":
            rows = _text_rows(path)
        case ".jsonl" | ".ndjson":
            rows = _json_rows(path, caption_column)
        case ".csv":
            rows = _csv_rows(path, caption_column)
        case ".parquet":
            rows = _parquet_rows(path, caption_column)
        case _:
            if path.is_file():
                raise UsageError(
                    f"{path} is not a file of captions (.txt, .jsonl, .csv, .parquet) or a folder of images"
                )
            rows = _image_rows(source, caption_column, caption_extension, split)
    if path.is_file():  # refuse a split that is not the file's
        split_of_files([str(path)], split=split, source=str(source))
    return _grouped(rows, source=str(source))


def _grouped(rows: Iterator[_Row | DroppedItem], *, source: str) -> Captions:
    groups: dict[str, dict[str, None]] = {}  # image or place in the file -> its captions, without repeats
    dropped: list[DroppedItem] = []
    for row in rows:
        if isinstance(row, DroppedItem):
            dropped.append(row)
            continue
        try:
            found = captions_of_value(row.value)
            if not found:
                raise UnusableEntry("has no caption")
            if any(START in text or END in text for text in found):
                raise UnusableEntry(f"its caption contains {START} or {END}, which mark the start and end of texts")
        except UnusableEntry as problem:
            dropped.append(DroppedItem(row.name, str(problem)))
            continue
        key = row.name if row.image is None else f"picture {row.image}"
        groups.setdefault(key, {}).update(dict.fromkeys(found))
    if not groups:
        why = f" ({len(dropped)} dropped; first {dropped[0].name}: {dropped[0].reason})" if dropped else ""
        raise UsageError(f"{source} has no captions{why}")
    return Captions(
        texts=tuple(text for group in groups.values() for text in group),
        groups=tuple(number for number, group in enumerate(groups.values()) for _ in group),
        dropped=tuple(dropped),
    )


# One reader per file format


def _text_rows(path: Path) -> Iterator[_Row | DroppedItem]:
    with _opened(path) as file:
        for line in text_lines(utf8_stream(file)):
            name = f"{path.name} line {line.number}"
            yield DroppedItem(name, line.problem) if line.problem else _Row(name, line.text)


def _json_rows(path: Path, column_name: str | None) -> Iterator[_Row | DroppedItem]:
    with _opened(path) as file:
        for row in json_rows(utf8_stream(file)):
            # Lines need not have the same keys, so the column is chosen for each.
            column = column_name or next((column for column in CAPTION_COLUMNS if column in row.values), "")
            yield _row(path, row, column)


def _csv_rows(path: Path, column_name: str | None) -> Iterator[_Row | DroppedItem]:
    with _opened(path) as file:
        rows = CsvFile(utf8_stream(file), strict=False, max_cell=MAX_CAPTION_BYTES)
        column = _column(column_name, rows.columns, path)
        for row in rows:
            yield _row(path, row, column)


def _row(path: Path, row: Row, column: str) -> _Row | DroppedItem:
    name = f"{path.name} line {row.line}"
    return DroppedItem(name, row.problem) if row.problem else _Row(name, row.values.get(column), _image(row.values))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of captions. Raises NotFound for all errors of the file system within the block."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror or error}") from None


def _parquet_rows(path: Path, column_name: str | None) -> Iterator[_Row | DroppedItem]:
    """Read one row group after another, so that a damaged one does not affect the others."""
    from sdcli.data.parquet import pyarrow_modules

    arrow, parquet = pyarrow_modules()
    if not path.is_file():
        raise NotFound(f"no file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            column = _column(column_name, file.schema_arrow.names, path)
            texts = [field.name for field in file.schema_arrow if holds_text(field.type)]
            columns = [column, *(name for name in FILE_COLUMNS if name in texts and name != column)]
            first = 1
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                try:
                    group = plain_rows(file.read_row_group(number, columns=columns))
                except (arrow.ArrowException, OSError, ValueError) as error:
                    yield DroppedItem(f"{path.name} rows {first} to {first + count - 1}", f"are damaged: {error}")
                    group = []
                for place, values in enumerate(group, start=first):
                    yield _Row(f"{path.name} row {place}", values[column], _image(values))
                first += count
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable parquet file: {error}") from None


def _image_rows(source: str | Path, column: str | None, extension: str, split: str) -> Iterator[_Row | DroppedItem]:
    from sdcli.data.sources import open_images

    images = open_images(source, caption_column=column, caption_extension=extension, split=split)
    yield from images.dropped
    without = set()
    for index in range(len(images)):
        item = images[index]
        without |= set() if item.captions else {item.name}
        yield _Row(item.name, item.captions)
    # captions without an image, and tables that were not read
    yield from (DroppedItem(one.name, one.text) for one in images.remarks if one.loses and one.name not in without)


def _column(column_name: str | None, present: Sequence[str], path: Path) -> str:
    column = pick_column(column_name, CAPTION_COLUMNS, present, source=str(path), what="--caption-column")
    if column is None:
        raise UsageError(
            f"{path} has no column {' or '.join(CAPTION_COLUMNS)} (it has {', '.join(present) or 'none'}); "
            "--caption-column names another"
        )
    return column


def _image(values: Mapping[str, Any]) -> str | None:
    """The image that a row describes."""
    found = next((values[name] for name in FILE_COLUMNS if values.get(name)), None)
    return found if isinstance(found, str) else None
