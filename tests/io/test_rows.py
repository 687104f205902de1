"""Rows of text, JSONL and CSV files: a line that cannot be read costs itself only; appending mends a torn line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from sdcli.io.rows import MAX_LINE, CsvFile, Row, TextLine, append_row, json_rows, text_lines


def test_lines_are_numbered_and_blank_ones_are_left_out() -> None:
    data = b"\xef\xbb\xbfone\r\n\n  two \nthr\xff\xffee"
    assert list(text_lines(io.BytesIO(data))) == [
        TextLine(1, "one"),
        TextLine(3, "two"),
        TextLine(4, "thr\udcff\udcffee"),
    ]
    assert list(text_lines(io.BytesIO(data), utf8=True))[-1] == TextLine(4, "", "is not UTF-8 text")


def test_a_line_that_is_too_long_is_one_problem() -> None:
    lines = list(text_lines(io.BytesIO(b"a" * 25 + b"\nb\n"), max_bytes=10))
    assert lines == [TextLine(1, "", "is longer than 10 bytes"), TextLine(2, "b")]


def test_damaged_json_costs_its_own_line_only() -> None:
    rows = list(json_rows(io.BytesIO(b'{"a": 1}\n{oops\n[1]\n' + b"[" * 100_000 + b'\n{"b": "\xe9"}\n{"c": NaN}')))
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0] == Row(1, {"a": 1})
    assert all(row.problem.startswith("is not a JSON object (") for row in rows[1:4])
    assert rows[4] == Row(5, {"b": "\udce9"})


def test_csv_rows_have_the_columns_of_the_header() -> None:
    file = CsvFile(io.BytesIO(b'\xef\xbb\xbfa,b\n1,"x\ny"\n2\n3,4,5\n\xff,6\n'))
    assert file.columns == ["a", "b"]
    rows = list(file)
    assert [row.line for row in rows] == [3, 4, 5, 6]
    assert [dict(row.values) for row in rows] == [
        {"a": "1", "b": "x\ny"},
        {"a": "2", "b": None},
        {},
        {"a": "\udcff", "b": "6"},
    ]
    assert [bool(row.problem) for row in rows] == [False, False, True, False]
    assert list(CsvFile(io.BytesIO(b"a\n\xff\nb\n"), utf8=True)) == [
        Row(2, problem="is not UTF-8 text"),
        Row(3, {"a": "b"}),
    ]


def test_a_misplaced_quote_ends_a_strict_file_only() -> None:
    data = b'a,b\n"x" y,1\nz,2\n'
    strict = list(CsvFile(io.BytesIO(data)))
    assert [row.problem.startswith("is not CSV, and nothing after it is read") for row in strict] == [True]
    assert [dict(row.values) for row in CsvFile(io.BytesIO(data), strict=False)] == [
        {"a": "x y", "b": "1"},
        {"a": "z", "b": "2"},
    ]


def test_a_broken_header_is_a_problem() -> None:
    (row,) = CsvFile(io.BytesIO(b"a" * (MAX_LINE + 1) + b",b\n1,2\n"))
    assert "field larger than field limit" in row.problem


def test_appending_ends_a_torn_line_first(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    append_row(descriptor, {"c": 3})
    append_row(descriptor, {"d": "é"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(descriptor, {"e": float("nan")})
    os.close(descriptor)
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in (lines[0], *lines[2:4])] == [{"a": 1}, {"c": 3}, {"d": "é"}]
    assert lines[1] == b'{"b"'
    assert lines[4:] == [b""]
