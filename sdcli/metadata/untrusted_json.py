"""Parses JSON from files that may be hostile: finite numbers and bounded nesting only."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Nesting limit. Records of real tools stay far below it; deeper ones are meant to break programs that walk them."""


def load_json(text: str) -> Any:
    """Parse JSON whose numbers are finite and whose nesting is at most MAX_DEPTH. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("is nested too deeply")
        level = [child for parent in level for child in _children(parent)]
    return value


def json_object(text: str) -> dict[str, Any] | None:
    """The object in a JSON text; None for invalid JSON and for any other value."""
    try:
        value = load_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is not a finite number")
    return number
