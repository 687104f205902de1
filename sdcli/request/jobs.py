"""Prompts files as lines of requests: each entry's fields under our own names; a bad one has a `problem`."""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections import Counter
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


class Occurrences:
    """How often each of many keys occurred, in some 20 bytes a key.

    Keys are hexadecimal and told apart by their first 64 bits, which are those of digests.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        """A hash table with the keys; 0 is an empty slot."""
        self._used = 0
        self._again: Counter[int] = Counter()
        """The further occurrences of those that occurred more than once."""

    def add(self, key: str) -> int:
        """Count an occurrence; its number, from 1."""
        number = int(key[:16], 16) or 1
        place = self._place(number)
        if self._slots[place]:
            self._again[number] += 1
            return 1 + self._again[number]
        self._slots[place] = number
        self._used += 1
        if 3 * self._used > 2 * len(self._slots):
            self._grow()
        return 1

    def _place(self, number: int) -> int:
        """The slot of a key, or the empty one that it gets."""
        slots, mask = self._slots, len(self._slots) - 1
        place = number & mask
        while slots[place] not in (0, number):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for number in old:
            if number:
                self._slots[self._place(number)] = number


def derived_seed(base_seed: int, key: str, occurrence: int) -> int:
    """A 32-bit seed that is the same for the same base seed, request and occurrence."""
    digest = hashlib.sha256(f"{base_seed}:{key}:{occurrence}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
