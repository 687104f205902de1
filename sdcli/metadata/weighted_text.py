"""Texts and weights of other tools' prompts -> a prompt in sdcli's syntax that reads as exactly these."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_TEXT = 100_000
"""Characters of a prompt whose syntax is converted."""

Spans = list[tuple[str, float]]
"""Pieces of a text with their weights."""

_OURS = {
    "AND": re.compile(r"\bAND\b"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "[ ]": re.compile(r"[\[\]]"),
    "( )": re.compile(r"[()]"),
    "<name:>": re.compile(r"<\w+:"),
}
"""What means something in a prompt of sdcli."""


def literal(text: str) -> str:
    """A text as a prompt that is text alone: a backslash stands before or in everything that has a meaning here."""
    text = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    text = re.sub(r"\b(?:AND|BREAK)\b", lambda match: f"{match[0][0]}\\{match[0][1:]}", text)
    return untagged(text)


def untagged(text: str) -> str:
    """A text in which `<name:...>` is no tag."""
    return re.sub(r"(?<!\\)<(?=\s*[A-Za-z])", r"\\<", text)


def weighted(spans: Iterable[tuple[str, float]]) -> str:
    """Pieces of a text with their weights as a prompt: `(red fox:1.3)`; adjacent ones of one weight become one."""
    merged: Spans = []
    for text, weight in spans:
        if merged and (merged[-1][1] == weight or not text.strip()):
            text, weight = merged[-1][0] + text, merged.pop()[1]
        merged.append((text, weight))
    return "".join(map(_written, merged))


def meanings(text: str, names: Iterable[str] = ("AND", "BREAK", "[ ]", "( )", "<name:>")) -> list[str]:
    """Which of the signs that mean something to sdcli are in a text."""
    return [name for name in names if _OURS[name].search(text)]


def without_editing(text: str) -> tuple[str, list[str]]:
    """A prompt of a tool that has A1111's weights alone, and what in it means more here and is made plain text."""
    found = meanings(text, ("AND", "BREAK"))
    changed = re.sub(r"\b(?:AND|BREAK)\b", lambda match: f"{match[0][0]}\\{match[0][1:]}", text)
    edited = _EDITING.sub(lambda match: literal(match[0]), changed)
    return untagged(edited), [*found, *(["[a|b], [a:b:0.5]"] if edited != changed else [])]


_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*[|:][^\[\]]*\]")


def _written(span: tuple[str, float]) -> str:
    text, weight = span
    number = f"{weight:.4f}".rstrip("0").rstrip(".")
    before, inner, after = re.fullmatch(r"(\s*)(.*?)(\s*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return literal(text) if number == "1" or not inner else f"{before}({literal(inner)}:{number}){after}"
