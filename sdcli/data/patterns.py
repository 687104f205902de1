"""Patterns of file names (`{00..03}.tar`, `train-*.parquet`) -> the files that they match."""

from __future__ import annotations

import glob
import os
import re

from sdcli.data.records import DroppedItem
from sdcli.errors import NotFound, UsageError

MAX_PATTERN = 1_000_000
"""The largest number of paths that braces may expand to."""


def matches(pattern: str) -> tuple[list[str], tuple[DroppedItem, ...]]:
    """The files that a pattern matches, in its order, and those that its braces name but that do not exist."""
    files: list[str] = []
    absent: list[DroppedItem] = []
    folder, rest = _existing_folder(pattern)
    for inside in expand_braces(rest):
        path = folder + inside
        if os.path.lexists(path):
            files.append(path)
        elif re.search(r"[*?\[]", inside):
            found = sorted(glob.glob(glob.escape(folder) + inside, recursive=True))
            files += found
            absent += [] if found else [DroppedItem(path, "matches no file")]
        else:
            absent.append(DroppedItem(path, "does not exist"))
    if not files:
        raise NotFound(f"no file matches {pattern}")
    return list(dict.fromkeys(files)), tuple(absent)


def _existing_folder(pattern: str) -> tuple[str, str]:
    """A pattern as the folder that it begins with, which exists by that very name, and the rest.

    So `shoot [2023]/{00..03}.tar` matches in the folder `shoot [2023]`, whose brackets are no pattern.
    """
    end = 0
    for match in re.finditer("/", pattern):
        if not os.path.isdir(pattern[: match.end()]):
            break
        end = match.end()
    return pattern[:end], pattern[end:]


def expand_braces(pattern: str) -> list[str]:
    """`{00..03}` -> 00 01 02 03, `{a,b}` -> a b, also nested and repeated, as in bash and WebDataset.

    Raises UsageError for unclosed braces and for more than MAX_PATTERN results.
    """
    depth, start = 0, pattern.find("{")
    if start < 0:
        return [pattern]
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 0:
            break
    else:
        raise UsageError(f"the brace in {pattern!r} is not closed")
    heads = _alternatives(pattern[start + 1 : end])
    tails = expand_braces(pattern[end + 1 :])
    if len(heads) * len(tails) > MAX_PATTERN:
        raise UsageError(f"{pattern!r} expands to more than {MAX_PATTERN:,} files")
    return [pattern[:start] + head + tail for head in heads for tail in tails]


def _alternatives(inside: str) -> list[str]:
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inside)
    if match is not None:
        first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1
        if abs(last - first) // step >= MAX_PATTERN:
            raise UsageError(f"{{{inside}}} expands to more than {MAX_PATTERN:,} files")
        padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-")[0] == "0" for end in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{number:0{width}d}" for number in numbers]
    parts, depth = [""], 0
    for letter in inside:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) == 1:  # `{x}` is not a list and stays as it is
        return [f"{{{one}}}" for one in expand_braces(inside)]
    return [one for part in parts for one in expand_braces(part)]
