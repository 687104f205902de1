"""A1111's prompt syntax as pure text: AND, prompt editing, alternation, BREAK and weights; and chunks of tokens.

    a cat AND a dog:0.7                     two prompts, composed by guidance
    [from:to:when] [to:when] [from::when]   editing: `when` is a fraction of the steps if it has a point, else a step
    [a|b]                                   alternation, another one at each step
    BREAK                                   what follows begins a new chunk
    (word:1.3) (word) [word] \\(            weight 1.3, 1.1 and 1/1.1; a literal bracket

Where it is malformed it is text. The rules are those of the webui's prompt_parser.py and sd_hijack_clip.py, except that
a bare prompt's last `:number` is text, that BREAK works inside brackets, and that a stray `|` disables nothing. All is
read in linear time, whatever the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TypeAlias

from sdcli.errors import UsageError

COMMA_BACKTRACK = 20
"""Where a chunk ends, up to so many tokens after its last comma go into the next one."""
MAX_WEIGHT = 1000.0
MAX_PARTS = 32
"""Prompts that AND may join; each takes a pass through the network."""
MAX_SPELLED = 10_000_000
"""Characters that a prompt may come to over all its steps."""

Words = Callable[[str], Sequence[int]]
"""Text -> token ids, without start and end."""


@dataclass(frozen=True)
class Span:
    """A piece of text with one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Text:
    """A text as the text encoder reads it at one step, with its brackets parsed."""

    text: str
    """As it is written, with its brackets."""
    sections: tuple[tuple[Span, ...], ...]
    """The spans between one BREAK and the next."""
    plain: bool = False
    """Cut to the text encoder's length, instead of continued in more chunks."""

    @classmethod
    def of(cls, text: str, syntax: str = "a1111") -> Text:
        """Parse a text. Raises UsageError for absurd weights."""
        if syntax == "plain":
            return cls(text, ((Span(text, 1.0),),), plain=True)
        return cls(text, tuple(tuple(spans) for spans in sections(text)))

    @property
    def unweighted(self) -> str:
        """The words without weights and BREAK."""
        return " ".join("".join(span.text for span in spans) for spans in self.sections)


@dataclass(frozen=True)
class SubPrompt:
    """One of the prompts that AND joins: its weight, and its text up to each of the steps where it changes."""

    weight: float
    texts: tuple[tuple[int, Text], ...]
    """(last step, text), ascending; the last one's step is that of the image. Steps count from 1."""

    def at(self, step: int) -> Text:
        """The text that generates a step."""
        return next(text for last, text in self.texts if step <= last)


@dataclass(frozen=True)
class Prompts:
    """The prompt and the negative prompt of one image, parsed for one pass of so many steps."""

    positive: tuple[SubPrompt, ...]
    """Those that AND joins."""
    negative: SubPrompt

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the prompts that AND joins; empty where there is one alone."""
        return tuple(prompt.weight for prompt in self.positive) if len(self.positive) > 1 else ()


@dataclass(frozen=True)
class Chunk:
    """Tokens that are encoded together, with their weights; without start, end and padding.

    A negative id stands for a row of the embeddings: -1 for row 0, -2 for row 1, ...
    """

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


EMPTY = Chunk()


def subprompts(prompt: str, *, steps: int, syntax: str = "a1111", compose: bool = True) -> tuple[SubPrompt, ...]:
    """What generates each of the steps; one part, or with `compose` as many as AND joins. In plain syntax all is text.

    Raises UsageError for more than MAX_PARTS of them, for absurd weights, and where editing and alternation spell out
    more than MAX_SPELLED characters.
    """
    if syntax == "plain":
        return (SubPrompt(1.0, ((steps, Text.of(prompt, syntax)),)),)
    texts = _AND.split(prompt) if compose else [prompt]
    if len(texts) == 1:
        return (_subprompt(1.0, prompt, steps),)
    if len(texts) > MAX_PARTS:
        raise UsageError(f"AND joins {len(texts)} prompts; it may be up to {MAX_PARTS}")
    weighted = [_weighted(text) for text in texts]
    return tuple(_subprompt(_checked(float(number or 1)), before, steps) for before, number in weighted)


def _subprompt(weight: float, text: str, steps: int) -> SubPrompt:
    read = cache(Text.of)
    return SubPrompt(weight, tuple((last, read(spelled)) for last, spelled in schedule(text, steps=steps)))


def parse_prompts(prompt: str, negative_prompt: str, *, steps: int, syntax: str) -> Prompts:
    """Both prompts, parsed for a pass of so many steps. Raises what `subprompts` raises."""
    (negative,) = subprompts(negative_prompt, steps=steps, syntax=syntax, compose=False)
    return Prompts(subprompts(prompt, steps=steps, syntax=syntax), negative)


def wrapped(prompt: str, template: str) -> str:
    """A prompt inside its template; each of the prompts that AND joins in one of its own, and its weight after it."""
    texts = _AND.split(prompt)
    if len(texts) == 1:
        return template.replace("{prompt}", prompt)
    pieces = []
    for text in texts:
        before, number = _weighted(text)
        pieces.append(template.replace("{prompt}", before.strip()) + (f":{number}" if number else ""))
    return " AND ".join(pieces)


def _weighted(text: str) -> tuple[str, str]:
    """A part of an AND and the number of its weight, empty where there is none."""
    before, _, number = text.rpartition(":")
    return (before, number.strip()) if _DECIMAL.fullmatch(number.strip()) else (text, "")


_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


# Editing and alternation


@dataclass(frozen=True)
class _Edit:
    before: _Nodes
    after: _Nodes
    when: int

    def at(self, step: int) -> _Nodes:
        return self.before if step <= self.when else self.after


@dataclass(frozen=True)
class _Alternation:
    options: Sequence[_Nodes]

    def at(self, step: int) -> _Nodes:
        return self.options[(step - 1) % len(self.options)]


_Nodes: TypeAlias = "list[str | _Nodes | _Edit | _Alternation]"


@dataclass
class _OpenBracket:
    """A bracket that waits for its end, and what stands in it: fields with separators between."""

    bracket: str
    fields: list[_Nodes] = field(default_factory=lambda: [[]])
    separators: str = ""

    def literal(self, end: str = "") -> _Nodes:
        nodes: _Nodes = [self.bracket, self.fields[0]]
        for separator, content in zip(self.separators, self.fields[1:], strict=True):
            nodes += [separator, content]
        return [*nodes, end]


_SCHEDULE_TOKEN = re.compile(r"\\.|[^\\\[\]():|]+|.", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


def schedule(text: str, *, steps: int) -> tuple[tuple[int, str], ...]:
    """(last step, text) of each stretch of steps with one text: editing and alternation spelled out.

    Raises UsageError for more than MAX_SPELLED characters.
    """
    nodes, ends = _scheduled(text, steps)
    if len(ends) > 1 and len(ends) * len(text) > MAX_SPELLED:
        raise UsageError(
            f"a prompt of {len(text):,} characters that changes {len(ends):,} times is too much "
            f"(over {MAX_SPELLED:,} characters in all)"
        )
    texts: list[tuple[int, str]] = []
    for end in ends:
        spelled = _spelled(nodes, end)
        if texts and texts[-1][1] == spelled:
            texts.pop()
        texts.append((end, spelled))
    return tuple(texts)


def _scheduled(text: str, steps: int) -> tuple[_Nodes, list[int]]:
    """The text as a tree, and the last steps of the stretches. A bracket is syntax only if all within it is sound."""
    top: _Nodes = []
    ends = {steps}
    opened: list[_OpenBracket] = []
    for match in _SCHEDULE_TOKEN.finditer(text):
        token = match[0]
        here = opened[-1].fields[-1] if opened else top
        if token in "([":
            opened.append(_OpenBracket(token))
        elif token in ":|" and opened:
            opened[-1].separators += token
            opened[-1].fields.append([])
        elif token in ")]":
            group = _closed(opened[-1], token, steps) if opened else None
            if group is not None:
                opened.pop()
                (opened[-1].fields[-1] if opened else top).append(group)
                if isinstance(group, _Alternation):
                    ends.update(range(1, steps))
                elif isinstance(group, _Edit) and group.when >= 1:
                    ends.add(group.when)
            else:  # nothing that is open around this can be sound any more
                top += [bracket.literal() for bracket in opened]
                opened.clear()
                top.append(token)
        else:
            here.append(token)
    top += [bracket.literal() for bracket in opened]
    return top, sorted(ends)


def _closed(group: _OpenBracket, end: str, steps: int) -> _Nodes | _Edit | _Alternation | None:
    """What a bracket is, now that it ends; None for text."""
    if group.bracket + end == "()":
        return group.literal(end) if group.separators in ("", ":") else None
    if group.bracket + end != "[]":
        return None
    if not group.separators:
        return group.literal(end)
    if set(group.separators) == {"|"}:
        return _Alternation(group.fields)
    *contents, last = group.fields
    number = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if number is None or group.separators not in (":", "::"):
        return None
    when = float(number[1])
    before, after = contents if len(contents) == 2 else ([], contents[0])
    return _Edit(before, after, int(max(0, min(steps, when * steps if "." in number[1] else when))))


def _spelled(nodes: _Nodes, step: int) -> str:
    pieces, waiting = [], [iter(nodes)]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
        elif isinstance(node, str):
            pieces.append(node)
        else:
            waiting.append(iter(node if isinstance(node, list) else node.at(step)))
    return "".join(pieces)


# Weights

_WEIGHT_TOKEN = re.compile(
    r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)|[)\]]|[^\\()\[\]:]+|:", re.DOTALL
)
_UNCLOSED = {"(": 1.1, "[": 1 / 1.1}


def sections(text: str) -> list[list[Span]]:
    """The spans of a text with their weights, in sections that BREAK parts. Raises UsageError for absurd weights."""
    tokens = list(_WEIGHT_TOKEN.finditer(text))
    factors = _factors(tokens)
    result: list[list[Span]] = [[]]
    products: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}
    for number, match in enumerate(tokens):
        token = match[0]
        if number in factors:
            opening, factor = factors[number]
            if factor is None:
                products[opening].pop()
            else:
                products[opening].append(products[opening][-1] * factor)
            continue
        weight = products["("][-1] * products["["][-1]
        pieces = [token[1:]] if token[0] == "\\" else _BREAK.split(token)
        for index, piece in enumerate(pieces):
            if index:
                result.append([])
            if piece:
                result[-1].append(Span(piece, weight if not piece.strip() else _checked(weight)))
    return [_merged(spans) for spans in result]


def _factors(tokens: Sequence[re.Match[str]]) -> dict[int, tuple[str, float | None]]:
    """Number of a token that is a bracket -> its kind, and for an opening one what it multiplies by."""
    factors: dict[int, tuple[str, float | None]] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for number, match in enumerate(tokens):
        token = match[0]
        if token in "([":
            opened[token].append(number)
            factors[number] = (token, _UNCLOSED[token])
        elif token[0] in ":)]":
            opening = "[" if token == "]" else "("
            if token != ":" and opened[opening]:
                start = opened[opening].pop()
                if match[1] is not None:
                    factors[start] = (opening, float(match[1]))
                factors[number] = (opening, None)
    return factors


def _merged(spans: list[Span]) -> list[Span]:
    """Adjacent spans of one weight as one span, so that they are tokenized as one text."""
    return [
        Span("".join(span.text for span in run), weight)
        for weight, run in itertools.groupby(spans, key=lambda span: span.weight)
    ]


def _checked(weight: float) -> float:
    if not abs(weight) <= MAX_WEIGHT:  # nan too
        raise UsageError(f"a weight in the prompt comes to {weight:.4g}; it may be up to {MAX_WEIGHT:g}")
    return weight


# Tokens


def chunked(
    text: Text, words: Words, *, room: int, comma: int | None = None, tokens: Mapping[str, range] = MappingProxyType({})
) -> tuple[Chunk, ...]:
    """A text with weights as chunks of at most `room` tokens, one at least; a plain one as one chunk, cut to fit.

    `comma` is the id of the tokenizer's comma. `tokens` are names that rows of embeddings stand for, row numbers by
    name; those of one name stay together.
    """
    if text.plain:
        return (_chunk([(id, 1.0) for id in words(text.text)[:room]]),)
    done: list[Chunk] = []
    for spans in text.sections:
        done += _cut(units(spans, words, tokens), room, comma)
    return tuple(done if len(done) == 1 or done[-1].ids else done[:-1])


def used(prompts: Iterable[SubPrompt], names: Iterable[str]) -> set[str]:
    """Which of the names of embeddings stand in the prompts, at any step."""
    texts = {text for part in prompts for _, text in part.texts}
    spans = [span.text for text in texts for section in text.sections for span in section]
    return {name for name in names if any(_token_pattern((name,)).search(text) for text in spans)}


def _cut(units: Iterable[tuple[Sequence[int], float]], room: int, comma: int | None) -> Iterator[Chunk]:
    """Chunks of a section; its last one may be empty."""
    held: list[tuple[int, float]] = []
    last_comma = -1
    for ids, weight in units:
        if ids[0] == comma:
            last_comma = len(held)
        elif len(held) == room and last_comma >= 0 and room - last_comma <= COMMA_BACKTRACK:
            yield _chunk(held[: last_comma + 1])
            held, last_comma = held[last_comma + 1 :], -1
        if len(held) + len(ids) > room:
            yield _chunk(held)
            held, last_comma = [], -1
        held += [(id, weight) for id in ids]
    yield _chunk(held)


def _chunk(held: Sequence[tuple[int, float]]) -> Chunk:
    return Chunk(tuple(id for id, _ in held), tuple(weight for _, weight in held))


def units(spans: Sequence[Span], words: Words, tokens: Mapping[str, range]) -> Iterator[tuple[Sequence[int], float]]:
    """Ids that stay together, with their weight: single tokens, and all rows of an embedding."""
    names = tuple(tokens)
    for span in spans:
        start = 0
        for match in _token_pattern(names).finditer(span.text) if names else ():
            yield from (((id,), span.weight) for id in words(span.text[start : match.start()]))
            assert match.lastindex is not None
            yield [-1 - row for row in tokens[names[match.lastindex - 1]]], span.weight
            start = match.end()
        yield from (((id,), span.weight) for id in words(span.text[start:]))


@lru_cache(maxsize=64)
def _token_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Names as whole words in any case, each in a group of its own; of two that fit the earlier one is taken."""

    def bordered(name: str) -> str:
        before, after = (r"\b" if re.match(r"\w", letter) else "" for letter in (name[0], name[-1]))
        return f"({before}{re.escape(name)}{after})"

    return re.compile("|".join(map(bordered, names)), re.IGNORECASE)
