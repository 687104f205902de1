"""Dynamic prompts: `{red|blue} car`, `{2$$a|b|c}` and `__animals__` from files, at random or in all combinations.

    {a|b|c}  {3::a|b}          one of them; a three times as often as b
    {2$$a|b|c}  {1-2$$ and $$a|b|c}    two of them in any order, joined by a comma; one or two, joined by " and "
    __animals__  __sea/fish__  a line of animals.txt, sea/fish.txt in the wildcards folder (# begins a comment line)
    \\{ \\| \\} \\_             a literal sign

Choices stand within choices and in the files' lines. The syntax is that of the `dynamicprompts` library, which itself
takes `//` and `#` in a prompt for comments, cannot count combinations, and draws otherwise with another version.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from sdcli.errors import NotFound, UsageError
from sdcli.request.schema import did_you_mean

MAX_COMBINATIONS = 10_000
MAX_PIECES = 10_000
"""Choices and texts in one prompt; files that name each other can double without end."""
MAX_CHARACTERS = 20_000_000
"""Of all combinations together."""
MAX_TAKEN = 100
"""Options that one choice may take at once."""
MAX_DEPTH = 40
MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _Choice:
    options: tuple[_Template, ...]
    weights: tuple[float, ...]
    low: int
    high: int
    separator: str


@dataclass(frozen=True)
class _Wildcard:
    name: str


_Template: TypeAlias = "tuple[str | _Choice | _Wildcard, ...]"


@dataclass(frozen=True)
class Wildcards:
    """Reads dynamic prompts; `folder` holds the files of `__names__`."""

    folder: Path | None = None
    _read: dict[str, tuple[_Template, ...]] = field(default_factory=dict, compare=False, repr=False)
    _counts: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    _texts: dict[str, list[str]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise NotFound(f"no folder {self.folder} of wildcards")

    def has_choices(self, text: str) -> bool:
        """Whether there is anything to draw in a text. Raises UsageError for malformed braces."""
        return any(not isinstance(node, str) for node in _parsed(text))

    def choose(self, text: str, *, seed: int, purpose: str) -> str:
        """The text with each choice made at random; equal for an equal seed and purpose, on any machine and version.

        Raises UsageError for what is malformed, not in the folder, or endless.
        """
        numbers = _numbers(f"{purpose}:{seed}")
        budget = itertools.count(1)
        return "".join(self._draw(_parsed(text), numbers, budget, ()))

    def combinations(self, text: str) -> list[str]:
        """Every text that can be chosen, each once, in the order in which they are written.

        Raises UsageError as `choose` does, and for more than MAX_COMBINATIONS.
        """
        template = _parsed(text)
        count = self._count(template, ())
        if count > MAX_COMBINATIONS:
            shown = f"{count:,}" if count < _UNCOUNTABLE else f"over {_UNCOUNTABLE:,}"
            raise UsageError(f"the prompt has {shown} combinations; it may be up to {MAX_COMBINATIONS:,}")
        return list(dict.fromkeys(self._all(template)))

    def _draw(
        self, template: _Template, numbers: Iterator[float], budget: Iterator[int], inside: tuple[str, ...]
    ) -> Iterator[str]:
        for node in template:
            if next(budget) > MAX_PIECES:
                raise UsageError(f"the prompt has over {MAX_PIECES:,} pieces")
            if isinstance(node, str):
                yield node
            elif isinstance(node, _Wildcard):
                lines = self._lines(node.name, inside)
                yield from self._draw(lines[int(next(numbers) * len(lines))], numbers, budget, (*inside, node.name))
            else:
                count = node.low + int(next(numbers) * (node.high - node.low + 1))
                picked = _picked(node.weights, count, numbers)
                yield node.separator.join(
                    "".join(self._draw(node.options[index], numbers, budget, inside)) for index in picked
                )

    def _all(self, template: _Template, inside: tuple[str, ...] = ()) -> list[str]:
        texts = [""]
        for node in template:
            each = self._each(node, inside)
            if len(each) * sum(map(len, texts)) + len(texts) * sum(map(len, each)) > MAX_CHARACTERS:
                raise UsageError(f"the combinations come to over {MAX_CHARACTERS:,} characters")
            texts = [before + text for before in texts for text in each]
        return texts

    def _each(self, node: str | _Choice | _Wildcard, inside: tuple[str, ...]) -> list[str]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, _Wildcard):
            if node.name not in self._texts:
                lines = self._lines(node.name, inside)
                self._texts[node.name] = [text for line in lines for text in self._all(line, (*inside, node.name))]
            return self._texts[node.name]
        options = [self._all(option, inside) for option in node.options]
        return [
            node.separator.join(texts)
            for count in range(node.low, node.high + 1)
            for some in itertools.permutations(options, count)
            for texts in itertools.product(*some)
        ]

    def _count(self, template: _Template, inside: tuple[str, ...]) -> int:
        """How many texts `_all` would give, or _UNCOUNTABLE."""
        total = 1
        for node in template:
            if isinstance(node, _Wildcard):
                if node.name not in self._counts:
                    lines = self._lines(node.name, inside)
                    self._counts[node.name] = sum(self._count(line, (*inside, node.name)) for line in lines)
                total *= self._counts[node.name]
            elif isinstance(node, _Choice):
                # sums of the products of k counts, for each k; times k! orders
                sums = [1] + [0] * node.high
                for option in node.options:
                    own = self._count(option, inside)
                    for k in range(node.high, 0, -1):
                        sums[k] = min(sums[k] + sums[k - 1] * own, _UNCOUNTABLE)
                total *= sum(math.factorial(min(k, 20)) * sums[k] for k in range(node.low, node.high + 1))
            total = min(total, _UNCOUNTABLE)
        return total

    def _lines(self, name: str, inside: tuple[str, ...]) -> tuple[_Template, ...]:
        """The lines of a wildcard's file, inside those of the others. Raises UsageError."""
        if name in inside:
            raise UsageError(f"the wildcard __{name}__ names itself: {' > '.join((*inside, name))}")
        if len(inside) >= MAX_DEPTH:
            raise UsageError(f"wildcards name each other {MAX_DEPTH} deep: {' > '.join(inside[:3])} > ...")
        if name not in self._read:
            self._read[name] = self._file(name)
        return self._read[name]

    def _file(self, name: str) -> tuple[_Template, ...]:
        if self.folder is None:
            raise UsageError(f"__{name}__ is a line of a file in the wildcards folder; --wildcards DIR names it")
        folder = self.folder.resolve()
        path = (folder / f"{name}.txt").resolve()
        if not path.is_relative_to(folder):
            raise UsageError(f"the wildcard __{name}__ leaves the folder {self.folder}")
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise UsageError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB")
            text = data.decode("utf-8-sig")
        except OSError:
            files = itertools.islice(folder.rglob("*.txt"), 1000)
            names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
            raise UsageError(f"no {name}.txt in {self.folder}{did_you_mean(name, names)}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text") from None
        lines = [line.strip() for line in text.splitlines()]
        try:
            templates = tuple(_parsed(line) for line in lines if line and not line.startswith("#"))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if not templates:
            raise UsageError(f"{path} has no lines")
        return templates


_UNCOUNTABLE = 10**18
_TOKEN = re.compile(r"\\[{}|_]|__(?P<name>[^\W_](?:[\w./-]*?[^\W_])?)__|[{}|]|[^\\{}|_]+|.", re.DOTALL)
_AMOUNT = re.compile(r"\s*(?:(\d{1,4})|(\d{0,4})-(\d{0,4}))\s*")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})::")


@dataclass
class _OpenBrace:
    """Braces that wait for their end: the options so far, each a list of nodes."""

    options: list[list[str | _Choice | _Wildcard]] = field(default_factory=lambda: [[]])


@lru_cache(maxsize=4096)
def _parsed(text: str) -> _Template:
    """A text as a template. Raises UsageError for braces that do not match, and for what is invalid in them."""
    top = _OpenBrace()
    opened = [top]
    for match in _TOKEN.finditer(text):
        token = match[0]
        here = opened[-1].options
        if match["name"] is not None:
            here[-1].append(_Wildcard(match["name"]))
        elif token == "{":
            if len(opened) > MAX_DEPTH:
                raise UsageError(f"braces are nested over {MAX_DEPTH} deep")
            opened.append(_OpenBrace())
        elif token == "}":
            if len(opened) == 1:
                raise UsageError("a } in the prompt has no {; \\} is a literal one")
            choice = _choice(opened.pop())
            opened[-1].options[-1].append(choice)
        elif token == "|" and len(opened) > 1:
            here.append([])
        else:
            here[-1].append(token[1:] if len(token) == 2 and token[0] == "\\" else token)
    if len(opened) > 1:
        raise UsageError("a { in the prompt is never closed; \\{ is a literal one")
    return _joined(top.options[0])


def _choice(group: _OpenBrace) -> _Choice:
    low, high, separator = 1, 1, ","
    first = _joined(group.options[0])
    if first and isinstance(first[0], str) and "$$" in first[0]:
        amount, *more = first[0].split("$$", 2)
        number = _AMOUNT.fullmatch(amount)
        if number is None or (number[1] is None and not (number[2] or number[3])):
            raise UsageError(f"{{{amount}$$...}}: should begin with how many, as 2 or 1-3")
        count = len(group.options)
        low = int(number[1] or number[2] or 1)
        high = int(number[1] or number[3] or count)
        if high < 1 or low > min(high, count):
            raise UsageError(f"{{{amount}$$...}}: so many cannot be taken of {count}")
        high = min(high, count)
        if high > MAX_TAKEN:
            raise UsageError(f"{{{amount}$$...}}: at most {MAX_TAKEN} can be taken at once")
        separator, rest = (more[0], more[1]) if len(more) == 2 else (separator, more[0])
        first = (rest, *first[1:])
    options, weights = [], []
    for option in (first, *map(_joined, group.options[1:])):
        weight = _WEIGHT.match(option[0]) if option and isinstance(option[0], str) else None
        options.append((option[0][weight.end() :], *option[1:]) if weight else option)  # type: ignore[index]
        weights.append(float(weight[1]) if weight else 1.0)
    if not all(weights):
        raise UsageError("an option in the prompt has the weight 0, so it would never be chosen")
    return _Choice(tuple(options), tuple(weights), low, high, separator)


def _joined(nodes: Sequence[str | _Choice | _Wildcard]) -> _Template:
    """Adjacent texts as one."""
    joined: list[str | _Choice | _Wildcard] = []
    for is_text, run in itertools.groupby(nodes, key=lambda node: isinstance(node, str)):
        several = list(run)
        joined += ["".join(map(str, several))] if is_text else several
    return tuple(joined)


def _picked(weights: Sequence[float], count: int, numbers: Iterator[float]) -> list[int]:
    """So many different options, by their weights, in the order in which they were picked."""
    left = dict(enumerate(weights))
    picked: list[int] = []
    for _ in range(count):
        place = next(numbers) * sum(left.values())
        for index, weight in left.items():  # noqa: B007  (the last one, where rounding leaves none)
            place -= weight
            if place < 0:
                break
        picked.append(index)
        del left[index]
    return picked


def _numbers(key: str) -> Iterator[float]:
    """Uniform numbers in [0, 1), the same for the same key for ever, which Python's `random` does not promise."""
    for count in itertools.count():
        digest = hashlib.sha256(f"{key}:{count}".encode()).digest()
        yield int.from_bytes(digest[:6], "big") / 2**48
