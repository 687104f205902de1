"""The layout of A1111's `parameters` text: prompts, the parameters wherever they stand, and the lines behind them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LEAST_PAIRS = 3
"""Pairs that make a line one of parameters, as in the web UI."""
MAX_ATTEMPTS = 50
"""Lines that are tried, and brackets without an end that are looked for, in a hostile text."""

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class A1111Text:
    """The parts of a `parameters` text."""

    prompt: str
    negative: str
    pairs: dict[str, str]
    """The parameters; of a key that is given twice the last value."""
    repeated: dict[str, str] = field(default_factory=dict)
    """The earlier values of such keys."""
    after: dict[str, str] = field(default_factory=dict)
    """What stands behind the parameters, by its label (`Template`, `Negative Template` ...)."""

    @property
    def is_record(self) -> bool:
        """Whether its parameters are those of an image; a text of another kind hardly has two of these names."""
        return len(self.pairs.keys() & _USUAL) >= 2


def split_a1111(text: str) -> A1111Text:
    """Split a `parameters` text by the web UI's rules.

    The parameters are the last line that begins with `Steps: 20,`; otherwise one that begins with another usual name;
    otherwise the last line. They are parameters only if at least 3 pairs match. The text is ambiguous and loses, here
    as in the web UI: white space around each line, blank lines at the start of a prompt, and the sign of a prompt's
    line that itself begins with `Negative prompt:` (everything after it counts as negative).
    """
    text = text.strip()
    start, pairs, end = _parameters(text)
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    before = text[:start]
    if start < len(text) and not before.endswith("\n"):  # its lines were joined by spaces
        before = before.replace(" Negative prompt:", "\nNegative prompt:", 1)
    for line in map(str.strip, before.removesuffix("\n").split("\n")):
        if line.startswith("Negative prompt:"):
            negative = True
            line = line.removeprefix("Negative prompt:").strip()
        if line or prompts[negative]:
            prompts[negative].append(line)
    values: dict[str, dict[str, None]] = {}
    for key, value in pairs:
        if value:
            values.setdefault(key, {}).pop(unquoted := _unquote(value), None)
            values[key][unquoted] = None
    return A1111Text(
        "\n".join(prompts[0]),
        "\n".join(prompts[1]),
        {key: list(ones)[-1] for key, ones in values.items()},
        {key: "; ".join(list(ones)[:-1]) for key, ones in values.items() if len(ones) > 1},
        _labelled(text[end:].split("\n")),
    )


_USUAL = {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash"}
_BEGIN = re.compile(r"^[ \t]*(?:Seed|Sampler|Size|CFG scale|Model|Model hash|Width|Version): ", re.MULTILINE)
_STEPS = re.compile(r"^[ \t]*Steps: *\d+ *(?:,|$)", re.MULTILINE)
_STEPS_WITHIN = re.compile(r"(?<=[ \t])Steps: *\d+ *,")
_OTHER_KEY = re.compile(r"(?!Negative prompt:)[A-Z][\w \-/]{1,30}: ")


def _parameters(text: str) -> tuple[int, Pairs, int]:
    """Where the parameters begin, their pairs, and where they end; the end of the text, if there are none."""
    last_line = text.rfind("\n") + 1
    for starts in (_last(_STEPS, text), _last(_BEGIN, text), _within(text), [last_line]):
        for start in starts:
            pairs, end = _pairs(text, start)
            if len(pairs) >= LEAST_PAIRS and (start == last_line or len({key for key, _ in pairs} & _USUAL) >= 2):
                return start, pairs, end
    return len(text), [], len(text)


def _within(text: str) -> list[int]:
    """Where parameters may begin inside a line: some sites join the lines of a text by spaces."""
    starts = _last(_STEPS_WITHIN, text)
    return [start for start in starts if not _OTHER_KEY.match(text, text.rfind("\n", 0, start) + 1)]


def _last(pattern: re.Pattern[str], text: str) -> list[int]:
    return [match.start() for match in pattern.finditer(text)][-MAX_ATTEMPTS:][::-1]


_RUN = re.compile(r"([\w \-/]+)(:?)")
_QUOTED = re.compile(r'"(?:[^\\"]|\\.)+"(?=[ \t\r]*(?:,|\n|$))', re.DOTALL)
_BARE = re.compile(r"[^,\n]*")
_NEXT = re.compile(r"[ \t\r]*,[ \t\r]*(?:\n(?=[ \t]*[A-Z][\w \-/]*: )(?![ \t]*(?:Negative )?Template: ))?")


def _pairs(text: str, position: int) -> tuple[Pairs, int]:
    """The `Key: value` pairs from a place on, and where they end: with their line, outside of quotes and brackets.

    A key is a word character, then words, spaces, `-` and `/`. A line that ends in a comma goes on in the next one.
    Takes linear time: the web UI's single expression for a whole pair takes quadratic time on a long line without a
    colon, minutes for a hostile image.
    """
    pairs: Pairs = []
    attempts = 0
    line_end = _line_end(text, position)
    while run := _RUN.search(text, position, line_end):
        position = run.end()
        key = run[1].lstrip(" -/")
        if not run[2] or len(key) < 2:
            continue
        while position < line_end and text[position] in " \t":
            position += 1
        value = _QUOTED.match(text, position)
        if value is not None:
            end = value.end()
        elif text[position : position + 1] in ("[", "{") and attempts < MAX_ATTEMPTS:
            closed = _bracket_end(text, position)
            attempts += closed is None
            end = closed if closed is not None else _bare_end(text, position)
        else:
            end = _bare_end(text, position)
        pairs.append((key, text[position:end].rstrip(" \t\r")))
        position = end
        following = _NEXT.match(text, position)
        if following is not None:
            position = following.end()
        if position > line_end:  # a value of several lines, or a line that goes on in the next one
            line_end = _line_end(text, position)
        if following is None and position >= line_end:
            break
    return pairs, line_end


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _bare_end(text: str, position: int) -> int:
    match = _BARE.match(text, position)
    assert match is not None
    return match.end()


_BRACKETS = re.compile(r'"(?:[^\\"]|\\.)*"|[\[\]{}]', re.DOTALL)


def _bracket_end(text: str, position: int) -> int | None:
    """Where a value in brackets (JSON) ends, if a comma or the line's end follows."""
    opened: list[str] = []
    for match in _BRACKETS.finditer(text, position):
        if match[0] in ("[", "{"):
            opened.append(match[0])
        elif match[0] in ("]", "}"):
            if opened.pop() + match[0] not in ("[]", "{}"):
                return None
            if not opened:
                return match.end() if re.compile(r"[ \t\r]*(?:,|\n|$)").match(text, match.end()) else None
    return None


_LABEL = re.compile(r"([A-Z][\w \-/]{0,40}):(?:\s+|$)(.*)", re.DOTALL)


def _labelled(lines: Iterable[str]) -> dict[str, str]:
    """The lines behind the parameters by their labels, with those that follow; those without one are `notes`."""
    found: dict[str, list[str]] = {}
    label = "notes"
    for line in map(str.strip, lines):
        if match := _LABEL.fullmatch(line):
            label, line = match[1], match[2]
        if line or label in found:
            found.setdefault(label, []).append(line)
    texts = {label: "\n".join(ones).strip() for label, ones in found.items()}
    return {label: text for label, text in texts.items() if text}


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value, strict=False))
        except ValueError:
            return value
    return value
