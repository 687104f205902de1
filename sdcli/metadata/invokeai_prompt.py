"""InvokeAI's prompt syntax (compel's) in that of sdcli.

    word+ word-- (some words)1.3 "some words"+      weights: each + is 1.1, each - is 0.9; they multiply
    ("a", "b").and()                                texts that are encoded apart, as BREAK does
    withLora(name, 0.8)                             a LoRA

`.swap()` and `.blend()` have no counterpart: they stay as text, and are named. Round brackets without a weight are
only a group; square brackets, AND and everything else that means something to sdcli are text. The rules are those of
compel's prompt_parser.py, where what is malformed is text up to the next space, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sdcli.metadata.weighted_text import MAX_TEXT, Spans, literal, meanings, weighted

MAX_NESTING = 50
"""Brackets within brackets; deeper ones are text."""
PLUS, MINUS = 1.1, 0.9


@dataclass
class InvokePrompt:
    """A prompt in sdcli's syntax."""

    text: str
    loras: list[dict[str, Any]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """What was only text, here or there, and is text now."""


def converted(text: str) -> InvokePrompt:
    """A prompt of InvokeAI in sdcli's syntax. Takes linear time."""
    if len(text) > MAX_TEXT:
        return InvokePrompt(literal(text), kept=["all of it: it is too long"])
    parser = _Parser(text)
    whole = parser.conjunction()
    if whole is None:
        whole = weighted(parser.spans())
    found = dict.fromkeys([*parser.kept, *meanings(text, ("AND", "BREAK", "[ ]", "<name:>"))])
    return InvokePrompt(whole, parser.loras, list(found))


_SYMBOLS = r"()\",.+\-="
_WORD = re.compile(rf"(?:\\[{_SYMBOLS}]|[+-](?=[^\s{_SYMBOLS}])|[^\s{_SYMBOLS}])+")
_SIGNS = re.compile(r"\++|-+")
_NUMBER = r"[+-]?(?:\d+\.\d*|\.\d+)|-?\d+"
_WEIGHT = re.compile(rf"\++|-+|{_NUMBER}|\.attend\(\s*(\++|-+|{_NUMBER})\s*\)")
_CALL = re.compile(r"\.(swap|blend|and|add)\s*\(")
_LORA = re.compile(rf"(?:useLora|withLora)\(\s*([\w-]+)\s*(?:,\s*({_NUMBER})\s*)?\)")
_WHOLE = re.compile(rf"\.(and|add)\(\s*((?:{_NUMBER})(?:\s*,\s*(?:{_NUMBER}))*)?\s*\)\s*")
_SPACE = re.compile(r"\s+")
_FREE = re.compile(r"\S+")


class _Parser:
    """Reads one text from the left; a group that is not sound is text up to the next space."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.loras: list[dict[str, Any]] = []
        self.kept: list[str] = []
        self.ends = _bracket_ends(text)

    def conjunction(self) -> str | None:
        """The prompt, if all of it is `("a", "b").and()`."""
        start = len(self.source) - len(self.source.lstrip())
        end = self.ends.get(start)
        if end is None or self.source[start] != "(":
            return None
        call = _WHOLE.fullmatch(self.source, end + 1)
        if call is None:
            return None
        if call[2] and any(float(number) != 1 for number in call[2].split(",")):
            return None
        parts, position = [], start + 1
        while True:
            position = self._skip(position)
            part = self._group(position, 0) or self._word(position)
            if part is None:
                return None
            parts.append(weighted(part[0]))
            position = self._skip(part[1])
            if position == end:
                return " BREAK ".join(parts)
            if self.source[position] != ",":
                return None
            position += 1

    def spans(self) -> Spans:
        """The whole prompt in pieces."""
        spans: Spans = []
        position = 0
        while position < len(self.source):
            if space := _SPACE.match(self.source, position):
                spans.append((space[0], 1.0))
                position = space.end()
                continue
            found = self._lora(position) or self._operand(position, 0, free=True)
            if found is None:
                free = _FREE.match(self.source, position)
                assert free is not None
                if call := _CALL.search(free[0]):
                    self.kept.append(f".{call[1]}()")
                found = [(_unescaped(free[0]), 1.0)], free.end()
            spans += found[0]
            position = found[1]
        return spans

    def _operand(self, start: int, depth: int, *, free: bool) -> tuple[Spans, int] | None:
        """A group or word with its weight. At the top level a bare word is left to `free` text, commas and all."""
        group = self._group(start, depth)
        if group is not None:
            spans, end = group
            weight = _WEIGHT.match(self.source, end)
            if weight is not None:
                factor = _factor(weight[1] or weight[0])
                return [(text, one * factor) for text, one in spans], weight.end()
            if call := _CALL.match(self.source, end):
                self.kept.append(f".{call[1]}()")
                end = self.ends.get(call.end() - 1, call.end() - 1) + 1
                return [(_unescaped(self.source[start:end]), 1.0)], end
            return spans, end
        word = self._word(start)
        if word is None:
            return None
        spans, end = word
        signs = _SIGNS.match(self.source, end)
        if signs is not None:
            return [(spans[0][0], _factor(signs[0]))], signs.end()
        return None if free else word

    def _group(self, start: int, depth: int) -> tuple[Spans, int] | None:
        """The content of brackets or quotes, and where they end; None where they are not sound."""
        end = self.ends.get(start)
        if end is None or depth >= MAX_NESTING:
            return None
        spans: Spans = []
        position = start + 1
        while position < end:
            letter = self.source[position]
            if letter in ",.":
                found: tuple[Spans, int] | None = ([(letter, 1.0)], position + 1)
            elif space := _SPACE.match(self.source, position):
                found = [(space[0], 1.0)], space.end()
            else:
                found = self._lora(position) or self._operand(position, depth + 1, free=False)
            if found is None or found[1] > end:
                return None
            spans += found[0]
            position = found[1]
        return spans, end + 1

    def _word(self, start: int) -> tuple[Spans, int] | None:
        word = _WORD.match(self.source, start)
        return None if word is None else ([(_unescaped(word[0]), 1.0)], word.end())

    def _lora(self, start: int) -> tuple[Spans, int] | None:
        match = _LORA.match(self.source, start)
        if match is None:
            return None
        weight = float(match[2]) if match[2] else 1.0
        entry = {"path": match[1], "unet_weight": weight, "text_weight": weight}
        if entry not in self.loras:
            self.loras.append(entry)
        return [], match.end()

    def _skip(self, position: int) -> int:
        space = _SPACE.match(self.source, position)
        return space.end() if space else position


def _bracket_ends(text: str) -> dict[int, int]:
    """Where each round bracket and each quoted text ends, by where it begins; no quote reaches over a bracket's end."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r'\\.|[()"]', text, re.DOTALL):
        if match[0] == "(":
            opened.append(match.start())
        elif match[0] == ")" and opened:
            if text[opened[-1]] == '"':  # a quote that is left open within the brackets
                while opened and text[opened[-1]] == '"':
                    opened.pop()
            if opened:
                ends[opened.pop()] = match.start()
        elif match[0] == '"':
            if opened and text[opened[-1]] == '"':
                ends[opened.pop()] = match.start()
            else:
                opened.append(match.start())
    return ends


def _factor(operator: str) -> float:
    if operator[0] == "+" and set(operator) == {"+"}:
        return PLUS ** min(len(operator), 100)
    if set(operator) == {"-"}:
        return MINUS ** min(len(operator), 100)
    return float(operator)


def _unescaped(text: str) -> str:
    return re.sub(r'\\([()"])', r"\1", text)
