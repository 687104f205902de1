"""Metadata tables beside images (metadata.jsonl, .csv, .parquet): their rows, and the lines that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.data.records import DroppedItem, UnusableEntry, captions_of_value, label_of_value
from sdcli.errors import BadImage, UsageError
from sdcli.io.json_files import parse_json
from sdcli.io.rows import CsvFile, Row, json_rows
from sdcli.io.text import utf8_stream
from sdcli.request.schema import did_you_mean

TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "image_path", "image")
CAPTION_COLUMNS = ("text", "caption")
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class ImageRow:
    """A row of a table: an image file, relative to the table's folder, with its captions and label."""

    place: str
    """Its position: `line 7`."""
    file: str
    captions: tuple[str, ...]
    label: str | None
    problem: str = ""
    """Why its image cannot be used."""


@dataclass(frozen=True)
class Table:
    """The content of a metadata file."""

    rows: tuple[ImageRow, ...]
    dropped: tuple[DroppedItem, ...]
    """Lines that cannot be read; their names are `metadata.csv line 7`."""
    has_captions: bool
    """Whether it has a caption column, even an empty one."""
    columns: tuple[str, ...] = ()
    """The names of all its columns, sorted."""


def read_table(path: Path, *, name: str, image_column: str | None = None, caption_column: str | None = None) -> Table:
    """Read a metadata file; `name` is its name in messages. Columns that are not given have their usual names.

    Raises BadImage for a file that cannot be read at all, UsageError if a column is missing from all rows.
    """
    dropped: list[DroppedItem] = []
    classes: tuple[str, ...] = ()
    columns = [image_column, caption_column, LABEL_COLUMN, *FILE_COLUMNS, *CAPTION_COLUMNS]
    try:
        match path.suffix:
            case ".jsonl":
                with open(path, "rb") as table:
                    lines = list(_rows_of_file(json_rows(utf8_stream(table)), name, dropped))
            case ".csv":
                with open(path, "rb") as table:
                    lines = list(_rows_of_file(CsvFile(utf8_stream(table)), name, dropped))
            case _:
                classes, lines = _parquet_rows(path, name, columns)
    except OSError as error:
        raise BadImage(f"cannot read {path}: {error.strerror or error}") from None
    present = sorted({column for _, values in lines for column in values})
    file_column = pick_column(image_column, FILE_COLUMNS, present, source=name, what="--image-column")
    if lines and file_column is None:
        raise UsageError(
            f"{name} has no column {' or '.join(FILE_COLUMNS)} that names the images "
            f"(it has {', '.join(present) or 'none'}); name another with --image-column"
        )
    text_column = pick_column(caption_column, CAPTION_COLUMNS, present, source=name, what="--caption-column")
    rows = []
    for place, values in lines:
        file = values.get(file_column or "")
        if not isinstance(file, str) or not file:
            dropped.append(DroppedItem(f"{name} {place}", f"has no {file_column}"))
            continue
        rows.append(_row(place, file, values, text_column, classes))
    return Table(tuple(rows), tuple(dropped), has_captions=text_column is not None, columns=tuple(present))


def pick_column(
    given: str | None, usual: Sequence[str], present: Sequence[str], *, source: str, what: str
) -> str | None:
    """The given column, or else the first usual one that exists. Raises UsageError if the given one does not exist."""
    if given is None:
        return next((column for column in usual if column in present), None)
    if given not in present and present:
        hint = did_you_mean(given, present) or f"; it has {', '.join(present)}"
        raise UsageError(f"{source} has no column {given!r} ({what}){hint}")
    return given


def pyarrow_modules() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises UsageError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("parquet files need the package pyarrow: pip install 'sdcli[data]'") from None
    return pyarrow, pyarrow.parquet


def _row(place: str, file: str, values: Mapping[str, Any], text_column: str | None, classes: Sequence[str]) -> ImageRow:
    try:
        captions = captions_of_value(values.get(text_column)) if text_column is not None else ()
        label = named_label(values.get(LABEL_COLUMN), classes)
        return ImageRow(place, file, captions, label_of_value(label))
    except UnusableEntry as problem:
        return ImageRow(place, file, (), None, problem=str(problem))


def _rows_of_file(
    rows: Iterable[Row], name: str, dropped: list[DroppedItem]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for row in rows:
        if row.problem:
            dropped.append(DroppedItem(f"{name} line {row.line}", row.problem))
        else:
            yield f"line {row.line}", row.values


def _parquet_rows(
    path: Path, name: str, columns: Sequence[str | None]
) -> tuple[tuple[str, ...], list[tuple[str, Mapping[str, Any]]]]:
    """The names of the classes, if Hugging Face's features give them to the labels, and the rows. Raises BadImage."""
    arrow, parquet = pyarrow_modules()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            classes = class_names_of(features_of(file.schema_arrow).get(LABEL_COLUMN))
            table = file.read(columns=[column for column in names if column in columns])
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise BadImage(f"{name} cannot be read as a parquet file: {error}") from None
    present = dict.fromkeys(names)
    rows = enumerate(plain_rows(table), start=1)
    return classes, [(f"row {number}", {**present, **values}) for number, values in rows]


def features_of(schema: Any) -> dict[str, Any]:
    """Hugging Face's features in the schema's metadata; {} if there are none, or invalid ones."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def feature_type(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def class_names_of(feature: Any) -> tuple[str, ...]:
    """The names of a feature of classes (`ClassLabel`), whose cells hold their places; () for any other."""
    names = feature.get("names") if feature_type(feature) == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def named_label(label: Any, names: Sequence[str]) -> Any:
    """The class name of a place among the names, None for -1, an unknown class; other labels as they are.

    Raises UnusableEntry for a place behind the last name.
    """
    if not names or not isinstance(label, int):
        return label
    if label >= len(names):
        raise UnusableEntry(f"its label is {label}, but there are only {len(names)} classes")
    return names[label] if label >= 0 else None


def holds_text(kind: Any) -> bool:
    """Whether a pyarrow type is one of its three types of strings."""
    types = pyarrow_modules()[0].types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a pyarrow table; strings that are not UTF-8, which parquet does not forbid, come as their bytes."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError:
        columns = {name: [_plain(cell) for cell in table.column(name)] for name in table.column_names}
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return rows


def _plain(cell: Any) -> Any:
    arrow, _ = pyarrow_modules()
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if arrow.types.is_list(cell.type) or arrow.types.is_large_list(cell.type):
            return [_plain(one) for one in cell.values]
        return cell.as_buffer().to_pybytes() if hasattr(cell, "as_buffer") else b"\xff"
