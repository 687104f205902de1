"""Prompts files as lines of requests: each entry's fields under our own names; a bad one has a `problem`."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdcli.errors import UsageError
from sdcli.request.prompt_files import OWN, read_rows
from sdcli.request.prompt_options import translated
from sdcli.request.schema import canonical, field_name
from sdcli.request.wildcards import MAX_COMBINATIONS, Wildcards


@dataclass(frozen=True)
class Line:
    """One entry of a prompts file, or the problem with it."""

    number: int
    fields: Mapping[str, Any]
    """Some of OWN, and those of the request under their own names."""
    problem: str | None = None


def read_lines(source: str) -> Iterator[Line]:
    """The entries of a prompts file, or of stdin for `-`.

    Raises NotFound, and UsageError for a file that cannot be read as a whole.
    """
    for row in read_rows(source):
        own = {field_name(name): value for name, value in row.values.items() if field_name(name) in OWN}
        if row.problem:
            yield Line(row.line, own, row.problem)
            continue
        try:
            values = translated(row.values)
            own = {field_name(name): value for name, value in values.items() if field_name(name) in OWN}
            request = {name: value for name, value in values.items() if field_name(name) not in OWN}
            yield Line(row.line, {**own, **canonical(request)})
        except UsageError as error:
            yield Line(row.line, own, str(error))


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
