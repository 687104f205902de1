"""JSON from outside: parsing with one kind of error, and small files that hold one object or list."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Never, TypeVar

from sdcli.errors import BadWeights, NotFound
from sdcli.io.stand_ins import stand_in

MAX_BYTES = 2**20
"""Bytes of a configuration file."""

MAX_DEPTH = 64
"""Levels of nesting in strict JSON: no tool writes more, and deeper values break programs that walk them."""

T = TypeVar("T", dict[str, Any], list[Any])


def parse_json(text: str | bytes, *, strict: bool = False, finite: bool = True) -> Any:
    """JSON text -> plain data. With `strict`, only finite numbers, and at most MAX_DEPTH levels of nesting.

    With `finite=False` strict JSON may hold NaN and Infinity, as Python programs write them.
    A byte-order mark before the text is allowed, as some editors write it.
    Raises ValueError for everything that is not JSON, also for text that is nested too deeply or not UTF-8.
    """
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text
    try:
        refuse = strict and finite
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite) if refuse else json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value] if strict else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        level = [child for parent in level for child in _children(parent)]
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """JSON text that holds an object -> a dict. Raises ValueError."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def read_json_object(
    path: Path,
    *,
    default: dict[str, Any] | None = None,
    missing: str = "the model is incomplete",
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """The object in a JSON file; `default`, if given, where there is no such file.

    Raises NotFound, whose sentence ends with `missing`, and BadWeights for a damaged or too large file.
    """
    return _read(path, dict, default, missing, max_bytes)


def read_json_list(
    path: Path,
    *,
    default: list[Any] | None = None,
    missing: str = "the model is incomplete",
    max_bytes: int = MAX_BYTES,
) -> list[Any]:
    """The list in a JSON file; see `read_json_object`."""
    return _read(path, list, default, missing, max_bytes)


def _read(path: Path, kind: type[T], default: T | None, missing: str, max_bytes: int) -> T:
    try:
        if path.stat().st_size > max_bytes:
            raise BadWeights(f"{path} is larger than any configuration")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        if default is None:
            raise NotFound(f"no file {path}; {missing}") from None
        return default
    except (OSError, ValueError) as error:
        raise BadWeights(stand_in(path) or f"{path} cannot be read: {error}") from None
    if not isinstance(value, kind):
        raise BadWeights(f"{path} should hold a JSON {'object' if kind is dict else 'list'}")
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large")
    return number
