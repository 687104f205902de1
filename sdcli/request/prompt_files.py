"""Prompts files: text lines, JSON, JSONL, CSV, TSV and kohya's TOML, recognised by their content -> rows of values."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from sdcli.errors import NotFound, UsageError
from sdcli.io.rows import CsvFile, Row, text_lines
from sdcli.io.text import utf8_stream
from sdcli.request.prompt_options import KNOWN, text_line
from sdcli.request.schema import GenerationRequest, did_you_mean, field_name

MAX_BYTES = 512 * 2**20
"""The largest prompts file that is read."""
OWN = ("custom_id", "num_images", "n")
"""What an entry may have besides the fields of its request."""

_FIELDS = frozenset({*(info.alias or name for name, info in GenerationRequest.model_fields.items()), *OWN, "size"})
_JSON, _TABLES = (".json", ".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_OTHERS = {".yaml": "a YAML", ".yml": "a YAML", ".xlsx": "an Excel", ".xls": "an Excel", ".parquet": "a Parquet"}
_BEGINS_OBJECT = re.compile(r"""\{\s*(?:"[^"]*"|'[^']*')\s*:|\{\s*\}\s*$""")
_BEGINS_ARRAY = re.compile(r"""\[\s*\{\s*["'][^"']*["']\s*:""")


def read_rows(source: str) -> Iterator[Row]:
    """The entries of a prompts file, or of stdin for `-`, with the names that they have there.

    A bad line costs itself only. Raises NotFound, and UsageError for a file that cannot be read as a whole.
    """
    suffix = PurePath(source).suffix.lower()
    name = "stdin" if source == "-" else source
    if suffix in _OTHERS:
        raise UsageError(f"{source} is {_OTHERS[suffix]} file; prompts files are text, JSON, JSONL, CSV or TSV")
    data = _plain(_bytes_of(source), name)
    if suffix == ".toml":
        yield from _toml_rows(data, name)
        return
    document = _document(data, name, named=suffix in _JSON)
    if document is not None:
        yield from document
        return
    table = _table(data, suffix)
    if table is None or _first_line_is_json(data):
        yield from _line_rows(data, json_alone=suffix in _JSON or _first_line_is_json(data))
    else:
        yield from table.rows(name)


def _bytes_of(source: str) -> bytes:
    try:
        if source != "-":
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        elif sys.stdin is None:
            raise UsageError("--prompts-file - reads stdin, which is closed")
        else:
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise NotFound(f"cannot read the prompts file {source}: {problem}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{source} is larger than {MAX_BYTES // 2**20} MiB")
    return data


def _plain(data: bytes, name: str) -> bytes:
    """The file in UTF-8 without byte-order marks; a line of it that is not UTF-8 is left to its row."""
    data = utf8_stream(io.BytesIO(data)).read()
    if b"\0" in data:
        raise UsageError(
            f"{name} is no text file: it has NUL bytes (if it is UTF-16 without its mark, save it as UTF-8)"
        )
    return re.sub(rb"(^|\n|\r)\xef\xbb\xbf", rb"\1", data)  # files that were put together have marks inside


def _lines_of(data: bytes) -> io.BytesIO:
    """The data with the ends of lines that Windows and old Macs write as line feeds."""
    return io.BytesIO(re.sub(rb"\r\n?", b"\n", data))


# JSON


class _Object(dict[str, Any]):
    """A JSON object, and the first of its keys that is there twice."""

    twice: str = ""

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> _Object:
        made = cls(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            made.twice = next(name for name in names if names.count(name) > 1)
        return made


_DECODER = json.JSONDecoder(object_pairs_hook=_Object.of)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_row(line: int, value: Any) -> Row:
    """A value as an entry: an object, or a text as a line of a text file."""
    if isinstance(value, str):
        return _text_row(line, value)
    if not isinstance(value, dict):
        return Row(line, problem=f"is not a JSON object ({_kind(value)})")
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        where, inner = waiting.pop()
        if isinstance(inner, _Object) and inner.twice:
            return Row(line, problem=f"{inner.twice} is given twice")
        if isinstance(inner, float) and not math.isfinite(inner):
            return Row(line, problem=f"{where}: should be a finite number, not {inner}")
        if isinstance(inner, dict):
            waiting += inner.items()
        elif isinstance(inner, list):
            waiting += [(where, one) for one in inner]
    return Row(line, value)


def _kind(value: Any) -> str:
    kinds: list[tuple[type, str]] = [(bool, "true or false"), (int, "a number"), (float, "a number"), (list, "a list")]
    return next((name for kind, name in kinds if isinstance(value, kind)), "null" if value is None else "a text")


def _parsed(text: str, read: Callable[[str], Any]) -> Any:
    """What a reader of JSON gives. Raises ValueError with what is wrong, however deep it is nested."""
    try:
        return read(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None


def _document(data: bytes, name: str, *, named: bool) -> list[Row] | None:
    """The rows of a file that is JSON as a whole: a list, objects over several lines, or an object with a list.

    None for other files, among them those with an object in each line. Raises UsageError for a broken list.
    """
    start = data.lstrip()[:1]
    alone = b"\n" not in _lines_of(data).getvalue().strip()
    if start not in (b"[", b"{") or (start == b"{" and not alone and _is_object(_first_line(data))):
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    try:
        values = _parsed(text, lambda text: list(_values(text)))
    except ValueError as error:
        if start == b"[" and (named or _BEGINS_ARRAY.match(text.lstrip())):
            raise UsageError(f"{name} is not JSON: {error}") from None
        return None
    if start == b"[" and not named and not all(isinstance(value, dict | str) for _, value in values):
        return None  # a prompt that begins with [1]
    if start == b"[" and not named and not values:
        return None
    if start == b"{" and len(values) == 1:
        return _entries(text, values[0][1], name)
    return [_json_row(line, value) for line, value in values]


def _values(text: str, *, start: int = 0) -> Iterator[tuple[int, Any]]:
    """The values of a list, or those that follow each other, with the lines in which they begin.

    After a list that does not begin with the text there may be anything.
    """
    line, counted = 1, 0

    def skip(place: int) -> int:
        match = _SPACE.match(text, place)
        return match.end() if match else place

    place = skip(start)
    listed = text[place : place + 1] == "["
    place = skip(place + 1) if listed else place
    first = True
    while place < len(text) and not (listed and text[place] == "]"):
        if listed and not first:
            if text[place] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = skip(place + 1)
        line, counted = line + text.count("\n", counted, place), place
        value, place = _DECODER.raw_decode(text, place)
        yield line, value
        first, place = False, skip(place)
    if listed and (place >= len(text) or (not start and skip(place + 1) < len(text))):
        raise json.JSONDecodeError("Expecting ']' and nothing after it", text, place)


def _entries(text: str, value: Any, name: str) -> list[Row]:
    """The rows of one object: itself, or those of its list, which have its other fields where they have none."""
    whole = _json_row(1 + text[: len(text) - len(text.lstrip())].count("\n"), value)
    if whole.problem or not isinstance(value, dict):
        return [whole]
    lists = [key for key, inner in value.items() if isinstance(inner, list) and field_name(key) not in _FIELDS]
    if not lists or {"prompt", "text"} & value.keys():
        return [whole]
    if len(lists) > 1:
        raise UsageError(f"{name} has two lists, {lists[0]} and {lists[1]}; the entries are one list")
    key = re.search(rf"{re.escape(json.dumps(lists[0]))}\s*:\s*(?=\[)", text)
    entries = [(whole.line, entry) for entry in value[lists[0]]]
    try:
        found = list(_values(text, start=key.end())) if key else []
    except ValueError:
        found = []  # the same key stands elsewhere, too
    entries = found if [entry for _, entry in found] == value[lists[0]] else entries
    others = {name: inner for name, inner in value.items() if name != lists[0]}
    rows = []
    for line, entry in entries:
        row = _json_row(line, entry)
        taken = {field_name(name) for name in row.values}
        defaults = {name: inner for name, inner in others.items() if field_name(name) not in taken}
        rows.append(row if row.problem else replace(row, values={**defaults, **row.values}))
    return rows


def _first_line(data: bytes) -> str:
    lines = (line.text for line in text_lines(_lines_of(data[: 2**20])) if not line.text.startswith("#"))
    return next(lines, "")


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(_parsed(text, _DECODER.decode), dict)
    except ValueError:
        return False


def _first_line_is_json(data: bytes) -> bool:
    first = _first_line(data)
    return _BEGINS_OBJECT.match(first) is not None or _is_object(first)


# Lines


def _line_rows(data: bytes, *, json_alone: bool) -> Iterator[Row]:
    """A row a line: an object, or a prompt with its options. With `json_alone` what is no object is a problem."""
    for line in text_lines(_lines_of(data), utf8=True):
        if line.problem:
            yield Row(line.number, problem=line.problem)
        elif line.text.startswith("#"):
            continue
        elif json_alone or _BEGINS_OBJECT.match(line.text):
            try:
                value = _parsed(line.text, _DECODER.decode)
            except ValueError as error:
                yield Row(line.number, problem=f"is not a JSON object ({str(error).partition(', ')[2] or error})")
                continue
            yield (
                _json_row(line.number, value)
                if isinstance(value, dict)
                else Row(line.number, problem=f"is not a JSON object ({_kind(value)})")
            )
        else:
            yield _text_row(line.number, line.text)


def _text_row(line: int, text: str) -> Row:
    try:
        return Row(line, text_line(text.strip()))
    except UsageError as error:
        return Row(line, problem=str(error))


# Tables


@dataclass(frozen=True)
class _Table:
    """A CSV or TSV file: its lines from the header on, and how many lines are before it."""

    data: bytes
    delimiter: str
    before: int

    def rows(self, name: str) -> Iterator[Row]:
        """The rows, with our names of columns. Raises UsageError for a header that names no column, or one twice."""
        file = CsvFile(io.BytesIO(self.data), utf8=True, delimiter=self.delimiter)
        names = [_column(column) for column in file.columns]
        if file.columns and not any(map(_is_known, names)):
            raise UsageError(
                f"{name}, line {self.before + 1}: the header names the columns, such as prompt,seed,steps; "
                f"none of {', '.join(map(repr, names[:5]))} is known{did_you_mean(names[0], _FIELDS)}"
            )
        fields = [field_name(column) for column in names if column]
        twice = next((field for field in fields if fields.count(field) > 1), None)
        if twice is not None:
            raise UsageError(f"{name}, line {self.before + 1}: {twice} is given twice")
        for row in file:
            line = row.line + self.before
            if None in row.values.values():
                yield Row(line, problem="has fewer cells than the header")
            elif row.values.get(""):
                yield Row(line, problem="has a cell in a column without a name")
            elif row.problem or any(row.values.values()):
                values = {_column(column): cell for column, cell in row.values.items() if cell != ""}
                yield Row(line, values, row.problem)


def _column(name: str) -> str:
    """A column's name as ours, where it is that with capitals and spaces, as people write them."""
    plain = name.strip()
    spelled = re.sub(r"[\s-]+", "_", plain.lower())
    return spelled if not _is_known(plain) and _is_known(spelled) else plain


def _is_known(name: str) -> bool:
    return field_name(name) in _FIELDS or name.replace("-", "_") in KNOWN


def _table(data: bytes, suffix: str) -> _Table | None:
    """The table that a file is: by its name, or by a first line that names the prompt, alone or with known columns."""
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    before, separator = 0, ""
    while True:
        first, _, rest = data.partition(b"\n")
        header = first.decode("utf-8", "surrogateescape").strip("\r\n")
        mark = re.fullmatch(r"sep=(.)", header, re.IGNORECASE)
        if (header.strip() and mark is None) or not rest:
            break
        separator = mark[1] if mark is not None else separator
        data, before = rest, before + 1
    if separator or suffix in _TABLES:
        default = separator or _TABLES[suffix]
        best = max((default, ",", ";", "\t"), key=lambda delimiter: sum(map(_is_known, _cells(header, delimiter))))
        return _Table(data, separator or best, before)
    for delimiter in ("\t", ",", ";"):
        cells = _cells(header, delimiter)
        if rest.strip() and len(cells) > 1 and "prompt" in cells and all(map(_is_near, filter(None, cells))):
            return _Table(data, delimiter, before)
    if rest.strip() and _cells(header, ",") == ["prompt"]:  # a table of one column, as a spreadsheet writes it
        return _Table(data, ",", before)
    return None


def _cells(header: str, delimiter: str) -> list[str]:
    try:
        return [_column(cell) for cell in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _is_near(name: str) -> bool:
    return _is_known(name) or bool(re.fullmatch(r"\w+", name) and did_you_mean(name, {*_FIELDS, *KNOWN}))


# TOML


def _toml_rows(data: bytes, name: str) -> Iterator[Row]:
    """kohya's prompts: `[prompt]` with what all have, and `[[prompt.subset]]` for each."""
    try:
        text = data.decode()
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not TOML: {error}") from None
    common = tables.get("prompt")
    subsets = common.get("subset") if isinstance(common, Mapping) else None
    if not isinstance(common, Mapping) or not isinstance(subsets, list) or len(tables) > 1:
        raise UsageError(f"{name} should hold kohya's [prompt] and [[prompt.subset]] alone")
    shared = {key: value for key, value in common.items() if key != "subset"}
    lines = [number for number, line in enumerate(text.split("\n"), start=1) if re.match(r"\s*\[\[", line)]
    for line, subset in zip(lines if len(lines) == len(subsets) else itertools.repeat(0), subsets, strict=False):
        row = _json_row(line, subset)
        yield row if row.problem else replace(row, values={**shared, **row.values})
