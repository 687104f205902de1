"""Prompts files: the lines of txt, JSONL and CSV files as fields of requests; a bad line has a `problem`."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from sdcli.errors import NotFound, UsageError
from sdcli.io.rows import CsvFile, Row, json_rows, text_lines
from sdcli.request.schema import canonical, field_name, is_list
from sdcli.request.wildcards import MAX_COMBINATIONS, Wildcards

KOHYA = {"n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "guidance_scale"}
"""kohya's one-letter options of a prompt line (`a cat --n dog --s 20`)."""
OWN = ("custom_id", "num_images", "n")
"""What an entry may have besides the fields of its request."""


@dataclass(frozen=True)
class Line:
    """One entry of a prompts file, or the problem with it."""

    number: int
    fields: Mapping[str, Any]
    """Some of OWN, and those of the request under their own names."""
    problem: str | None = None


def read_lines(source: str) -> Iterator[Line]:
    """The entries of a prompts file, or of stdin for `-`. Raises NotFound."""
    for line in _entries(source):
        own = {name: value for name, value in line.fields.items() if field_name(name) in OWN}
        request = {name: value for name, value in line.fields.items() if name not in own}
        fields = {field_name(name): value for name, value in own.items()}
        try:
            yield replace(line, fields={**fields, **canonical(request)})
        except UsageError as error:
            yield replace(line, fields=fields, problem=str(error))


def _entries(source: str) -> Iterator[Line]:
    """The same, the fields as they are named there."""
    if source == "-":
        data = sys.stdin.buffer.read()
        kind = "jsonl" if data.lstrip()[:1] == b"{" else "txt"
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise NotFound(f"cannot read the prompts file {source}: {error.strerror}") from None
        kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}.get(
            Path(source).suffix.lower(), "txt"
        )
    file = io.BytesIO(data)
    rows = json_rows(file, utf8=True) if kind == "jsonl" else _csv_rows(file) if kind == "csv" else _text_rows(file)
    for row in rows:
        yield Line(row.line, row.values, row.problem or None)


def _text_rows(file: BinaryIO) -> Iterator[Row]:
    for line in text_lines(file, utf8=True):
        if not line.text.startswith("#"):
            try:
                yield Row(line.number, {} if line.problem else _text_line(line.text), line.problem)
            except UsageError as error:
                yield Row(line.number, problem=str(error))


def _csv_rows(file: BinaryIO) -> Iterator[Row]:
    for row in CsvFile(file, utf8=True):
        if None in row.values.values():
            yield Row(row.line, problem="has fewer cells than the header")
        else:
            yield replace(row, values={name.strip(): cell for name, cell in row.values.items() if cell != ""})


def _text_line(text: str) -> dict[str, Any]:
    """`a cat --n dog --steps 20`: kohya's letters and A1111's words; what stands before the first is the prompt."""
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", text)
    fields: dict[str, Any] = {"prompt": prompt.strip()} if prompt.strip() else {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if not value:
            raise UsageError(f"--{name} has no value")
        field = field_name(KOHYA.get(name, name))
        if is_list(field):
            fields.setdefault(field, []).append(value)
        elif field in fields:
            raise UsageError(f"{field} is given twice")
        else:
            fields[field] = value
    return fields


DYNAMIC = ("prompt", "negative_prompt")
"""The fields of a request that may have choices such as {red|blue}."""


def combinations(lines: Iterable[Line], typed: Mapping[str, Any], wildcards: Wildcards) -> Iterator[Line]:
    """A line for each combination of the choices in each line's prompts."""
    for line in lines:
        texts = {name: str({**typed, **line.fields}.get(name) or "") for name in DYNAMIC}
        try:
            several = [wildcards.combinations(text) for text in texts.values()]
            count = math.prod(map(len, several))
            if count > MAX_COMBINATIONS:
                raise UsageError(f"the prompts have {count:,} combinations; it may be up to {MAX_COMBINATIONS:,}")
        except UsageError as error:
            yield replace(line, problem=line.problem or str(error))
            continue
        for some in itertools.product(*several):
            chosen = {name: text for name, text in zip(DYNAMIC, some, strict=True) if texts[name]}
            yield replace(line, fields={**line.fields, **chosen})


def derived_seed(base_seed: int, key: str, occurrence: int) -> int:
    """A 32-bit seed that is the same for the same base seed, request and occurrence."""
    digest = hashlib.sha256(f"{base_seed}:{key}:{occurrence}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
