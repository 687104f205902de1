"""The syntax of dynamic prompts: `{red|blue}`, `__animals__`, `${season=!__seasons__}` -> a tree. Text only.

The syntax is that of the `dynamicprompts` library. A backslash makes a sign literal, `#` and `//` begin no comment in a
prompt, and signs that the library refuses (`$5`, `50%`) are text. All is read in linear time, whatever the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from sdcli.errors import UsageError

MAX_TAKEN = 100
"""Options that one choice may take at once."""
MAX_DEPTH = 40


@dataclass(frozen=True)
class Choice:
    """`{a|3::b}`, `{1-2$$ and $$a|b|c}`: how many of the options are taken, by their weights, and what joins them."""

    options: tuple[Template, ...]
    weights: tuple[float, ...]
    low: int = 1
    high: int = 1
    separator: str = ","
    sampler: str = ""
    """`~` random, `!` all combinations, `@` one after the other; empty for that of the prompt."""

    @property
    def sole_wildcard(self) -> Wildcard | None:
        """The wildcard of `{2$$__x__}`, of which several different lines are taken."""
        if len(self.options) > 1 or self.high <= 1:
            return None
        return _alone(self.options[0])


@dataclass(frozen=True)
class Wildcard:
    """`__animals__`, `__colours*__`, `__story(hero=fox)__`: a line of the files of that name."""

    name: Template
    sampler: str = ""
    variables: tuple[tuple[str, Template], ...] = ()


@dataclass(frozen=True)
class Assignment:
    """`${name=value}`: chosen anew wherever the variable stands; `=!` once; `?=` only where it has no value yet."""

    name: str
    value: Template
    once: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Variable:
    """`${name}` or `${name:default}`."""

    name: str
    default: Template | None = None


@dataclass(frozen=True)
class Wrap:
    """`%{before ... after$$inner}`: the inner text in the place of the dots."""

    wrapper: Template
    inner: Template


Node: TypeAlias = "str | Choice | Wildcard | Assignment | Variable | Wrap"
Template: TypeAlias = "tuple[Node, ...]"

ELLIPSIS = re.compile(r"\.{3,}|[\u1801\u2026\u22ee\u22ef\u22f0\u22f1\ufe19]+")
"""What a wrapper has in the place of the inner text."""

_ESCAPE = r"\\[{}|_]|\\[$%](?=\{)|(?<=\{)\\[~!@]"
_LETTER = r"(?!__)(?:[^\s{}|$#<>()\\]|[ \t]|\\(?![{}|_]))"
_WILDCARD = (
    rf"__(?P<wildcard_sampler>[~!@])?(?P<name>(?=[^\s_]|\$\{{)(?:{_LETTER}|\$?\{{(?:(?!__)[^{{}}\n])*\}})+)"
    r"(?P<variables>\((?:(?!__)[^()\n])+\))?(?<![\s_])__"
)
_AMOUNT = r"\d{1,4}|\d{0,4}-\d{0,4}"
_BRACE = (
    r"%?\{(?:\s*(?P<sampler>[~!@]))?"
    rf"(?:\s*(?P<amount>{_AMOUNT})\s*\$\$(?:(?P<separator>(?:\\[{{}}|_]|(?!\$\$|\\[{{}}|_])[^{{}}])*?)\$\$)?)?"
)
_VARIABLE = (
    r"\$\{\s*(?P<variable>[A-Za-z_-][A-Za-z0-9_-]*)\s*(?:(?P<assign>\??=)\s*(?P<once>!)?\s*|(?P<default>:)\s*|(?=\}))"
)
_LOOSE = r"(?<![^\W_])__(?=[^\W_]|[*~!@])|(?<=[^\W_])__(?![\w(])"
"""A beginning or an end of a wildcard, without the other one."""
_TOKEN = re.compile(
    rf"(?P<escape>{_ESCAPE})|{_WILDCARD}|{_VARIABLE}|(?P<not_variable>\$\{{)|(?P<brace>{_BRACE})|[}}|]|(?P<loose>{_LOOSE})"
    r"|[^\\{}|_$%]+|.",
    re.DOTALL,
)
_WEIGHT = re.compile(r"\s*([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))::")


@dataclass
class _Open:
    """What waits for its `}`: the options so far, each a list of nodes."""

    match: re.Match[str] | None = None
    options: list[list[Node]] = field(default_factory=lambda: [[]])

    @property
    def is_choice(self) -> bool:
        return self.match is not None and self.match["brace"] is not None


@lru_cache(maxsize=4096)
def parse(text: str) -> Template:
    """A text as a template. Raises UsageError for what is malformed, not closed or not supported."""
    top = _Open()
    opened = [top]
    underscores = True
    for match in _TOKEN.finditer(text):
        token = match[0]
        here = opened[-1].options
        if match["name"] is not None:
            here[-1].append(_wildcard(match, before=here[-1]))
        elif match["not_variable"] is not None:
            raise UsageError(
                f"{_shown(text, match.start())} is no variable: ${{name=value}}, ${{name}} or ${{name:default}}; "
                r"\$\{ are literal signs"
            )
        elif match["brace"] or match["variable"]:
            if match["assign"] and len(opened) > 1:
                raise UsageError(f"{_shown(text, match.start())}: a variable is set outside of all braces")
            if len(opened) > MAX_DEPTH:
                raise UsageError(f"braces are nested over {MAX_DEPTH} deep")
            opened.append(_Open(match))
        elif token == "}":
            if len(opened) == 1:
                raise UsageError("a } in the prompt has no {; \\} is a literal one")
            nodes = _closed(opened.pop())
            opened[-1].options[-1] += nodes
        elif token == "|" and opened[-1].is_choice:
            here.append([])
        elif token == "|" and len(opened) > 1:
            shown = _shown(text, opened[-1].match.start())  # type: ignore[union-attr]
            raise UsageError(f"{shown}: alternatives stand in braces of their own, {{a|b}}; \\| is a literal one")
        elif match["loose"] is not None and underscores:
            start = 1 + max(text.rfind(space, 0, match.start()) for space in " \n")
            raise UsageError(
                f"{_shown(text, start)}: the __ belongs to no wildcard, as in __animals__; \\_ is a literal _"
            )
        else:
            underscores &= token != "\\_"
            here[-1].append(token[1:] if match["escape"] else token)
    if len(opened) > 1:
        signs = ("{", "\\{ is a literal one") if opened[-1].is_choice else ("${", "\\$\\{ are literal signs")
        raise UsageError(f"a {signs[0]} in the prompt is never closed; {signs[1]}")
    return joined(top.options[0])


def weighted_line(line: str) -> tuple[float, Template]:
    """A line of a wildcard's file, `20::hat`, as its weight (default 1) and what it says. Raises UsageError."""
    match = _WEIGHT.match(line)
    return (_positive(match), parse(line[match.end() :])) if match else (1.0, parse(line))


def _shown(text: str, start: int) -> str:
    end = min(start + 30, len(text))
    return text[start:end] + ("..." if end < len(text) else "")


def _wildcard(match: re.Match[str], *, before: list[Node]) -> Wildcard:
    if before and isinstance(before[-1], str) and re.search(r"\d#$", before[-1]):
        raise UsageError(
            f"{before[-1][-2:]}{match[0]}: a wildcard several times over is not supported; write {{2$$__name__}}"
        )
    name, listed = match["name"], match["variables"]
    variables = []
    if listed and "=" not in listed:  # a name with brackets, such as that of `poses (2).txt`
        name, listed = name + listed, None
    for pair in listed[1:-1].split(",") if listed else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_-][A-Za-z0-9_-]*", key):
            raise UsageError(f"{match[0]}: in the brackets stand variables, as in __story(hero=fox,place=sea)__")
        variables.append((key, parse(value)))
    path = parse(name.strip()) if "{" in name else (name.strip(),)
    return Wildcard(path, match["wildcard_sampler"] or "", tuple(variables))


def _closed(group: _Open) -> list[Node]:
    match = group.match
    assert match is not None
    if group.is_choice and match[0].startswith("%"):
        wrap = _wrap(joined(group.options[0])) if len(group.options) == 1 and match["amount"] is None else None
        return ["%", _choice(group, match)] if wrap is None else [wrap]
    if group.is_choice:
        return [_choice(group, match)]
    name, content = match["variable"], joined(group.options[0])
    if match["assign"]:
        return [Assignment(name, content, once=bool(match["once"]), keep=match["assign"] == "?=")]
    return [Variable(name, content if match["default"] else None)]


def _wrap(content: Template) -> Wrap | None:
    """`before ... after$$inner`; None for a text without `$$`, which a percent sign happens to stand before."""
    for index, node in enumerate(content):
        if isinstance(node, str) and "$$" in node:
            wrapper, _, inner = node.partition("$$")
            before, after = joined((*content[:index], wrapper)), joined((inner.lstrip(), *content[index + 1 :]))
            if before and isinstance(before[0], str):
                before = (before[0].lstrip(), *before[1:])
            return Wrap(before, after)
    return None


def _choice(group: _Open, match: re.Match[str]) -> Choice:
    options, weights = [], []
    for option in map(joined, group.options):
        first = option[0] if option and isinstance(option[0], str) else ""
        weight = _WEIGHT.match(first)
        options.append((first[weight.end() :], *option[1:]) if weight else option)
        weights.append(_positive(weight) if weight else 1.0)
    if not all(weights):
        raise UsageError("an option in the prompt has the weight 0, so it would never be chosen")
    sampler = match["sampler"] or ""
    amount = match["amount"]
    if amount is None:
        text = options[0][0] if options[0] and isinstance(options[0][0], str) else ""
        if "$$" in text:
            raise UsageError(f"{{{text.partition('$$')[0]}$$...}}: should begin with how many, as 2 or 1-3")
        return Choice(tuple(options), tuple(weights), sampler=sampler)
    low, high = _bounds(amount, len(options), _alone(options[0]) if len(options) == 1 else None)
    separator = "," if match["separator"] is None else re.sub(r"\\([{}|_])", r"\1", match["separator"])
    return Choice(tuple(options), tuple(weights), low, high, separator, sampler)


def _bounds(amount: str, count: int, sole: Wildcard | None) -> tuple[int, int]:
    """The fewest and the most options that `1-3$$` takes; of the lines of a wildcard that stands alone, their number
    is not known yet. Raises UsageError."""
    first, dash, last = (part.strip() for part in amount.partition("-"))
    if not first and not last:
        raise UsageError(f"{{{amount}$$...}}: should begin with how many, as 2 or 1-3")
    low = int(first or 1)
    if not dash:
        last = first
    if sole is not None and not last and low > 1:
        raise UsageError(f"{{{amount}$$__...__}}: of a wildcard's lines say how many at most, as 2-3")
    high = int(last or count)
    if sole is not None and low > high:
        raise UsageError(f"{{{amount}$$...}}: should be the fewest and the most, as 1-3")
    if sole is None or high <= 1:
        if high < 1 or low > min(high, count):
            raise UsageError(f"{{{amount}$$...}}: so many cannot be taken of {count}")
        high = min(high, count)
    if high > MAX_TAKEN:
        raise UsageError(f"{{{amount}$$...}}: at most {MAX_TAKEN} can be taken at once")
    return low, high


def _positive(match: re.Match[str]) -> float:
    weight = float(match[1])
    if weight < 0:
        raise UsageError(f"an option in the prompt has the weight {match[1]}; it should be above 0")
    return weight


def _alone(template: Template) -> Wildcard | None:
    """The wildcard that a template is, with nothing but space around it."""
    nodes = [node for node in template if not (isinstance(node, str) and not node.strip())]
    return nodes[0] if len(nodes) == 1 and isinstance(nodes[0], Wildcard) else None


def joined(nodes: Sequence[Node] | Iterable[Node]) -> Template:
    """Adjacent texts as one."""
    result: list[Node] = []
    for is_text, run in itertools.groupby(nodes, key=lambda node: isinstance(node, str)):
        several = list(run)
        result += ["".join(map(str, several))] if is_text else several
    return tuple(result)
