"""Sweeps: `steps=10,20` and `guidance-scale=1..9x3` -> every combination of the values, as lines to generate."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sdcli.errors import UsageError
from sdcli.request.fields import digits
from sdcli.request.jobs import OWN, Line, derived_seed
from sdcli.request.schema import GenerationRequest, canonical, did_you_mean, field_name

MOST_COMBINATIONS = 10_000
_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)x(\d{1,4})")
_FIELDS = {info.alias or name for name, info in GenerationRequest.model_fields.items()} - {"schema"} | {"size"}


@dataclass(frozen=True)
class Axis:
    """A field of the request and the values it takes one after the other, as they would be typed."""

    field: str
    values: tuple[str, ...]

    def fields(self, value: str) -> dict[str, Any]:
        """What a value means for the request; a size is its width and its height."""
        return canonical({self.field: value})


def parse_axis(text: str) -> Axis:
    """`steps=10,20`, `guidance-scale=1..9x3` (1, 5 and 9) or `prompt="a cat, sitting",a dog`. Raises UsageError."""
    name, equals, listed = text.partition("=")
    field = field_name(name.strip())
    if field not in _FIELDS:
        raise UsageError(f"--sweep: a request has no field {name!r}{did_you_mean(field, _FIELDS)}")
    try:
        entries = next(csv.reader([listed], skipinitialspace=True, strict=True), []) if equals else []
    except csv.Error as error:
        raise UsageError(f"--sweep: {text!r} is not a list of values ({error})") from None
    values = [value for entry in entries for value in _values(entry.strip())]
    if not values or not all(values):
        raise UsageError(f"--sweep is written as steps=10,20 or guidance-scale=1..9x3, not {text!r}")
    if len(set(values)) < len(values):
        raise UsageError(f"--sweep: {name} takes a value twice")
    return Axis(field, tuple(values))


def swept(lines: Iterable[Line], axes: Sequence[Axis], typed: Mapping[str, Any], *, base_seed: int) -> list[Line]:
    """Each line once for every combination, the last axis varying first; all of a line share their seeds.

    Raises UsageError for a field that has a value already, and for too many combinations.
    """
    each = [dict.fromkeys(name for value in axis.values for name in axis.fields(value)) for axis in axes]
    named = [name for names in each for name in names]
    if len(set(named)) < len(named):
        raise UsageError("--sweep: a field is swept twice")
    found = list(lines)
    for name in named:
        if name in typed or any(line.fields.get(name) is not None for line in found):
            raise UsageError(f"--sweep: {name} has a value already")
    if any({"n", "num_images"} & set(line.fields) for line in found):
        raise UsageError("--sweep: every combination gets equally many images (-n), so no line has its own number")
    count = len(found) * math.prod(len(axis.values) for axis in axes)
    if count > MOST_COMBINATIONS:
        raise UsageError(f"--sweep: {count:,} combinations are more than {MOST_COMBINATIONS:,}")
    more = []
    seen: Counter[str] = Counter()
    for line in found:
        both = {**typed, **line.fields}
        given = {name: value for name, value in both.items() if name not in OWN and value is not None}
        key = str(sorted(given.items()))
        seen[key] += 1
        has = {*given, *named}
        random = ("seed", "variation_seed") if "variation_strength" in has else ("seed",)
        seeds = {name: derived_seed(base_seed, f"{key}:{name}", seen[key]) for name in random if name not in has}
        for values in product(*(axis.values for axis in axes)):
            fields = {**line.fields, **seeds}
            for axis, value in zip(axes, values, strict=True):
                fields |= axis.fields(value)
            more.append(replace(line, fields=fields))
    return more


def _values(entry: str) -> list[str]:
    match = _RANGE.fullmatch(entry)
    if match is None:
        return [entry]
    first, last, count = float(match[1]), float(match[2]), int(match[3])
    if count < 2:
        raise UsageError(f"--sweep: a range has two values or more, not {entry!r}")
    return [digits(round(first + (last - first) * k / (count - 1), 10)) for k in range(count)]
