"""Rows of text, JSONL and CSV files with their line numbers, and appending to JSONL files.

A line that cannot be read costs itself only: it is a row with a `problem`, not an end.
"""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from sdcli.io.json_files import parse_object

MAX_LINE = 2**24
"""Bytes of a line, and letters of a CSV cell."""
csv.field_size_limit(MAX_LINE)  # a setting of the process, so it is made once
ROWS_OF_WRITE = 500
"""Rows that are appended in one write: so few bytes go out whole."""
_NOT_UTF8 = "is not UTF-8 text"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One entry of a file: the number of its (last) line, from 1, and its values by column."""

    line: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used, as a predicate: `is not UTF-8 text`."""


@dataclass(frozen=True)
class TextLine:
    """One line of text that is not blank, without the space around it."""

    number: int
    text: str
    problem: str = ""


def text_lines(file: BinaryIO, *, utf8: bool = False, max_bytes: int = MAX_LINE) -> Iterator[TextLine]:
    """The lines that are not blank, without a byte-order mark.

    What is not UTF-8 comes as surrogates (file names need it), or is a problem with `utf8`. Of a line that is too
    long only the problem is kept, so that no file can fill the memory. Raises OSError.
    """
    number = 0
    while raw := file.readline(max_bytes):
        number += 1
        whole = len(raw) < max_bytes or raw.endswith(b"\n")
        while not raw.endswith(b"\n") and len(raw) == max_bytes:
            raw = file.readline(max_bytes)
        if not whole:
            yield TextLine(number, "", f"is longer than {max_bytes:,} bytes")
            continue
        text = (raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw).decode("utf-8", "surrogateescape").strip()
        if utf8 and not _is_unicode(text):
            yield TextLine(number, "", _NOT_UTF8)
        elif text:
            yield TextLine(number, text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_rows(file: BinaryIO, *, utf8: bool = False, max_bytes: int = MAX_LINE) -> Iterator[Row]:
    """The rows of a JSONL file, an object a line; see `text_lines`. Raises OSError."""
    for line in text_lines(file, utf8=utf8, max_bytes=max_bytes):
        try:
            yield Row(line.number, problem=line.problem) if line.problem else Row(line.number, parse_object(line.text))
        except ValueError as error:
            yield Row(line.number, problem=f"is not a JSON object ({error})")


class CsvFile:
    """A CSV file with a header, whose rows are read while it is iterated. Raises OSError.

    What is not UTF-8 comes as surrogates or, with `utf8`, is a problem; cells missing at a row's end are None. With
    `strict`, a misplaced quote is a problem that ends the file, since no later row can be trusted; without, it is
    read as the csv module sees fit. `max_cell` is in letters.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        utf8: bool = False,
        strict: bool = True,
        max_cell: int = MAX_LINE,
        delimiter: str = ",",
    ) -> None:
        self._utf8, self._strict, self._max_cell = utf8, strict, max_cell
        self._rows = csv.DictReader(_lines_of(file), restkey="\0", strict=strict, delimiter=delimiter)
        self._broken_header = ""
        try:
            self.columns: Sequence[str] = self._rows.fieldnames or ()
        except csv.Error as error:
            self.columns, self._broken_header = (), str(error)

    def __iter__(self) -> Iterator[Row]:
        if self._broken_header:
            yield Row(self._rows.line_num, problem=f"is not CSV ({self._broken_header})")
            return
        while True:
            try:
                values = next(self._rows, None)
            except csv.Error as error:
                if self._strict:
                    yield Row(self._rows.line_num, problem=f"is not CSV, and nothing after it is read ({error})")
                    return
                yield Row(self._rows.line_num, problem=f"is not CSV ({error})")
                continue
            if values is None:
                return
            if "\0" in values:
                problem = "has more cells than the header; text with commas must stand in quotes"
                yield Row(self._rows.line_num, problem=problem)
            elif any(len(cell or "") > self._max_cell for cell in values.values()):
                yield Row(self._rows.line_num, problem=f"has a cell of more than {self._max_cell:,} letters")
            elif self._utf8 and not all(map(_is_unicode, filter(None, (*values, *values.values())))):
                yield Row(self._rows.line_num, problem=_NOT_UTF8)
            else:
                yield Row(self._rows.line_num, values)


def _lines_of(file: BinaryIO) -> Iterator[str]:
    for number, raw in enumerate(file):
        yield (raw if number else raw.removeprefix(_BYTE_ORDER_MARK)).decode("utf-8", "surrogateescape")


def append_row(descriptor: int, values: Mapping[str, Any]) -> None:
    """Append a line of JSON in one write to a file opened with O_RDWR and O_APPEND; see `append_rows`."""
    append_rows(descriptor, [values])


def append_rows(descriptor: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines of JSON to a file opened with O_RDWR and O_APPEND, in one write for some hundred of them.

    A last line that a killed process left unfinished is ended first, so that it costs itself only.
    Raises OSError, and ValueError for NaN and infinities.
    """
    waiting = iter(rows)
    while some := list(itertools.islice(waiting, ROWS_OF_WRITE)):
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        lines = b"".join(json.dumps(values, allow_nan=False).encode() + b"\n" for values in some)
        data = b"\n" * torn + lines
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
