"""ComfyUI's prompt syntax in that of sdcli: weights in round brackets and embeddings; everything else is text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sdcli.errors import UsageError
from sdcli.metadata.weighted_text import MAX_TEXT, literal, meanings
from sdcli.request.lora_tags import Tags, read_tags
from sdcli.request.prompt_syntax import MAX_WEIGHT, subprompts

MAX_NESTING = 100
"""Brackets within brackets."""


@dataclass(frozen=True)
class ConvertedPrompt:
    """A prompt in sdcli's syntax that means what a text means to ComfyUI."""

    text: str
    escaped: tuple[str, ...] = ()
    """What means something here, and was only text in ComfyUI."""
    embeddings: tuple[str, ...] = ()
    """The words that stand for textual inversions."""


def converted(text: str) -> ConvertedPrompt:
    """A text of ComfyUI as a prompt; it stays as it is where both tools read the same.

    Raises UsageError for weights that this tool has no number for.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"it has {len(text):,} characters; it may have up to {MAX_TEXT:,}")
    spans = _spans(text)
    words: list[str] = []
    spans = [(_embedding_words(piece, words), weight) for piece, weight in spans]
    bare = _EMBEDDING.sub(lambda match: _word(match[1]) + match[2], text)
    if _reads_the_same(bare, spans):
        return ConvertedPrompt(bare, embeddings=tuple(dict.fromkeys(words)))
    written = "".join(_weighted(literal(piece), weight) for piece, weight in spans)
    if not _reads_the_same(written, spans):
        raise UsageError("it cannot be written in the syntax of sdcli")
    whole = "".join(piece for piece, _ in spans)
    return ConvertedPrompt(written, tuple(meanings(whole, _SIGNS)), tuple(dict.fromkeys(words)))


def comfyui_text(text: str) -> tuple[str, list[str]]:
    """A prompt in ComfyUI's syntax of another tool that has it, and what of it is only text here. Raises nothing."""
    try:
        found = converted(text)
    except UsageError as error:
        return literal(text), [f"all of it: {error}"]
    return found.text, [*found.escaped, *(f"embedding:{word}" for word in found.embeddings)]


_EMBEDDING = re.compile(r"(?<![^\s(])embedding:([^\s,():]+)(,*)")
"""ComfyUI looks for it at the start of a word; a weight or a bracket ends it."""

_SIGNS = ("AND", "BREAK", "[ ]", "<name:>")
"""Signs that mean something in a prompt of sdcli alone."""


def _spans(text: str) -> list[tuple[str, float]]:
    """The pieces of a text with their weights, by the rules of ComfyUI's `token_weights`.

    A weight in inner brackets replaces that of the outer ones; brackets without one multiply it by 1.1.
    """
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    merged: list[tuple[str, float]] = []
    for piece, weight in _weights(hidden, 1.0, 0):
        shown = piece.replace("\0\1", ")").replace("\0\2", "(")
        if merged and merged[-1][1] == weight:
            shown = merged.pop()[0] + shown
        if shown:
            merged.append((shown, weight))
    return merged


def _weights(text: str, current: float, depth: int) -> list[tuple[str, float]]:
    if depth > MAX_NESTING:
        raise UsageError(f"brackets are nested over {MAX_NESTING} deep")
    found: list[tuple[str, float]] = []
    for piece in _bracketed(text):
        if not (len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")"):
            found.append((piece, current))
            continue
        inner, weight = piece[1:-1], current * 1.1
        colon = inner.rfind(":")
        if colon > 0:
            try:
                weight = float(inner[colon + 1 :])
                inner = inner[:colon]
            except ValueError:
                pass
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise UsageError(f"a weight is {weight:g}; it may be up to {MAX_WEIGHT:g}")
        found += _weights(inner, round(weight, 6), depth + 1)
    return found


def _bracketed(text: str) -> list[str]:
    """The text cut before and after its outermost brackets."""
    pieces, start, level = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            if level == 0 and place > start:
                pieces.append(text[start:place])
                start = place
            level += 1
        elif letter == ")":
            level -= 1
            if level == 0:
                pieces.append(text[start : place + 1])
                start = place + 1
    return [*pieces, text[start:]] if start < len(text) else pieces


def _reads_the_same(text: str, spans: list[tuple[str, float]]) -> bool:
    """Whether sdcli reads these pieces from a text, and nothing else, at any step."""
    try:
        if read_tags(text) != Tags(text):
            return False
        parts = [subprompts(text, steps=steps) for steps in (7, 20)]
    except UsageError:
        return False
    if any(len(part) != 1 or len(part[0].texts) != 1 for part in parts):
        return False
    ((_, read),) = parts[0][0].texts
    own = [(span.text, span.weight) for section in read.sections for span in section]
    if len(read.sections) != 1 or len(own) != len(spans):
        return False
    return all(
        a == b and math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6) for (a, x), (b, y) in zip(own, spans, strict=True)
    )


def _weighted(text: str, weight: float) -> str:
    number = f"{weight:.6f}".rstrip("0").rstrip(".")
    return text if number == "1" else f"({text}:{number})"


def _embedding_words(text: str, words: list[str]) -> str:
    """A text with `embedding:NAME` as the word NAME, which is added to `words`."""

    def word(match: re.Match[str]) -> str:
        words.append(_word(match[1]))
        return words[-1] + match[2]

    return _EMBEDDING.sub(word, text)


def _word(name: str) -> str:
    """The word for an embedding: its file's name without folder and suffix."""
    return re.split(r"[/\\]", re.sub(r"\.(?:safetensors|pt|bin)$", "", name))[-1] or name
