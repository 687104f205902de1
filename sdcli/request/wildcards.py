"""Dynamic prompts: `{red|blue} car`, `{2$$a|b|c}` and `__animals__` from files, at random or in all combinations.

    {a|b|c}  {3::a|b}          one of them; a three times as often as b
    {2$$a|b|c}  {1-2$$ and $$a|b|c}    two of them in any order, joined by a comma; one or two, joined by " and "
    __animals__  __sea/fish__  a line of animals.txt, sea/fish.txt in the wildcards folder (# begins a comment)
    __colours*__  {2$$__animals__}     a line of all files that match; two different lines
    ${x=!{a|b}} ${x} ${x:c}    a variable, what it holds, and what it holds if nothing set it

Choices stand within choices and in the files' lines. `dynamic_syntax.py` parses, `wildcard_files.py` reads the files.
The syntax is that of the `dynamicprompts` library, which draws otherwise with another version.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdcli.errors import UsageError
from sdcli.request.dynamic_syntax import (
    ELLIPSIS,
    MAX_DEPTH,
    Assignment,
    Choice,
    Node,
    Template,
    Variable,
    Wildcard,
    Wrap,
    parse,
)
from sdcli.request.wildcard_files import Lines, WildcardFolder

MAX_COMBINATIONS = 10_000
MAX_PIECES = 10_000
"""Choices and texts in one prompt; files that name each other can double without end."""
MAX_CHARACTERS = 20_000_000
"""Of all combinations together."""
MAX_VARIABLES = 200


@dataclass(frozen=True)
class _Scope:
    """Where a template stands: the values of variables, and the wildcards and variables around it."""

    variables: tuple[tuple[str, Template], ...] = ()
    """Sorted by name, so that equal scopes are equal."""
    inside: tuple[str, ...] = ()

    def get(self, name: str) -> Template | None:
        return next((value for own, value in self.variables if own == name), None)

    def having(self, values: Mapping[str, Template]) -> _Scope:
        if not values:
            return self
        both = {**dict(self.variables), **values}
        if len(both) > MAX_VARIABLES:
            raise UsageError(f"the prompt sets over {MAX_VARIABLES} variables")
        return _Scope(tuple(sorted(both.items(), key=lambda item: item[0])), self.inside)

    def within(self, name: str) -> _Scope:
        """The scope of what a wildcard or a variable becomes. Raises UsageError for one that contains itself."""
        if name in self.inside:
            kind = "variable" if name.startswith("$") else "wildcard"
            shown = name if name.startswith("$") else f"__{name}__"
            raise UsageError(f"the {kind} {shown} names itself: {' > '.join((*self.inside, name))}")
        if len(self.inside) >= MAX_DEPTH:
            raise UsageError(f"wildcards name each other {MAX_DEPTH} deep: {' > '.join(self.inside[:3])} > ...")
        return _Scope(self.variables, (*self.inside, name))


_NOWHERE = _Scope()


@dataclass(frozen=True)
class Wildcards:
    """Reads dynamic prompts; `folder` holds the files of `__names__`. Raises NotFound where it is none."""

    folder: Path | None = None
    _files: list[WildcardFolder] = field(default_factory=list, compare=False, repr=False)
    _counts: dict[object, int] = field(default_factory=dict, compare=False, repr=False)
    _texts: dict[object, list[str]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self._files.append(WildcardFolder(self.folder))

    def has_choices(self, text: str) -> bool:
        """Whether there is anything to draw in a text. Raises UsageError for malformed braces."""
        return any(not isinstance(node, str) for node in parse(text))

    def choose(self, text: str, *, seed: int, purpose: str) -> str:
        """The text with each choice made at random; equal for an equal seed and purpose, on any machine and version.

        Raises UsageError for what is malformed, not in the folder, or endless.
        """
        numbers = _numbers(f"{purpose}:{seed}")
        try:
            return _Draw(self, numbers).text(parse(text), _NOWHERE)
        except RecursionError:
            raise UsageError(_TOO_DEEP) from None

    def combinations(self, text: str) -> list[str]:
        """Every text that can be chosen, each once, in the order in which they are written.

        Raises UsageError as `choose` does, and for more than MAX_COMBINATIONS.
        """
        try:
            return self._combinations(parse(text))
        except RecursionError:
            raise UsageError(_TOO_DEEP) from None

    def _combinations(self, template: Template) -> list[str]:
        count = self._count(template, _NOWHERE)
        if count > MAX_COMBINATIONS:
            shown = f"{count:,}" if count < _UNCOUNTABLE else f"over {_UNCOUNTABLE:,}"
            raise UsageError(f"the prompt has {shown} combinations; it may be up to {MAX_COMBINATIONS:,}")
        return list(dict.fromkeys(self._all(template, _NOWHERE)))

    # All combinations

    def _all(self, template: Template, scope: _Scope) -> list[str]:
        result: list[str] = []
        for own in self._scopes(template, scope):
            texts = [""]
            for node in template:
                each = self._each(node, own)
                if len(each) * sum(map(len, texts)) + len(texts) * sum(map(len, each)) > MAX_CHARACTERS:
                    raise UsageError(f"the combinations come to over {MAX_CHARACTERS:,} characters")
                texts = [before + text for before in texts for text in each]
            result += texts
        return result

    def _scopes(self, template: Template, scope: _Scope) -> list[_Scope]:
        """The scope with the variables that a template sets; several where one that is chosen once has alternatives."""
        scopes: list[dict[str, Template]] = [{}]
        for node in template:
            if not isinstance(node, Assignment) or (node.keep and scope.get(node.name) is not None):
                continue
            if not node.once:
                scopes = [{**values, node.name: node.value} for values in scopes]
                continue
            more = []
            for values in scopes:
                own = _beneath(scope, values)
                if self._count(node.value, own) * len(scopes) > MAX_COMBINATIONS:
                    raise UsageError(f"${{{node.name}}} has over {MAX_COMBINATIONS:,} values")
                more += [{**values, node.name: (text,)} for text in dict.fromkeys(self._all(node.value, own))]
            scopes = more
        return [scope.having(values) for values in scopes]

    def _each(self, node: Node, scope: _Scope) -> list[str]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, Assignment):
            return [""]
        if isinstance(node, Wrap):
            inner = self._all(node.inner, scope)
            return [_wrapped(outer, text) for outer in self._all(node.wrapper, scope) for text in inner]
        if isinstance(node, Wildcard | Variable):
            key = (node, scope.variables)
            if key not in self._texts:
                several = self._options(node, scope)
                self._texts[key] = [text for template, own in several for text in self._all(template, own)]
            return self._texts[key]
        options = list(self._options(node, scope))
        low, high = _amounts(node, len(options))
        texts = [self._all(option, own) for option, own in options]
        return [
            node.separator.join(picked)
            for count in range(low, high + 1)
            for some in itertools.permutations(texts, count)
            for picked in itertools.product(*some)
        ]

    def _options(self, node: Choice | Wildcard | Variable, scope: _Scope) -> Iterator[tuple[Template, _Scope]]:
        """The options of a choice, the lines of a wildcard, or the value of a variable, each with its scope."""
        if isinstance(node, Variable):
            yield _value(node, scope)
            return
        if node.sampler in ("~", "@"):
            how = "at random" if node.sampler == "~" else "one after the other"
            raise UsageError(f"{_sampled(node)} takes its options {how}; all combinations take every one")
        wildcard = node if isinstance(node, Wildcard) else node.sole_wildcard
        if wildcard is None:
            assert isinstance(node, Choice)
            yield from ((option, scope) for option in node.options)
            return
        for name in dict.fromkeys(self._all(wildcard.name, scope)):
            own = scope.having(dict(wildcard.variables)).within(name)
            yield from ((template, own) for template in self.lines(name).templates)

    def _count(self, template: Template, scope: _Scope) -> int:
        """How many texts `_all` would give, or _UNCOUNTABLE."""
        return min(sum(self._count_in(template, own) for own in self._scopes(template, scope)), _UNCOUNTABLE)

    def _count_in(self, template: Template, scope: _Scope) -> int:
        total = 1
        for node in template:
            if isinstance(node, Wildcard | Variable):
                key = (node, scope.variables)
                if key not in self._counts:
                    self._counts[key] = sum(self._count(line, own) for line, own in self._options(node, scope))
                total *= self._counts[key]
            elif isinstance(node, Wrap):
                total *= self._count(node.wrapper, scope) * self._count(node.inner, scope)
            elif isinstance(node, Choice):
                several = list(self._options(node, scope))
                low, high = _amounts(node, len(several))
                # sums of the products of k counts, for each k; times k! orders
                sums = [1] + [0] * high
                for option, inner in several:
                    own = self._count(option, inner)
                    for k in range(high, 0, -1):
                        sums[k] = min(sums[k] + sums[k - 1] * own, _UNCOUNTABLE)
                total *= sum(math.factorial(min(k, 20)) * sums[k] for k in range(low, high + 1))
            total = min(total, _UNCOUNTABLE)
        return total

    def lines(self, name: str) -> Lines:
        """The lines of a wildcard's files. Raises UsageError."""
        if not self._files:
            raise UsageError(f"__{name}__ is a line of a file in the wildcards folder; --wildcards DIR names it")
        return self._files[0].lines(name)


_UNCOUNTABLE = 10**18
_TOO_DEEP = "the prompt and its wildcards are nested too deeply"


@dataclass(frozen=True)
class _Draw:
    """One choice at random of everything in a prompt."""

    wildcards: Wildcards
    numbers: Iterator[float]
    budget: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def text(self, template: Template, scope: _Scope) -> str:
        return "".join(self.texts(template, scope))

    def texts(self, template: Template, scope: _Scope) -> Iterator[str]:
        """The pieces of a template. Variables that it sets have their values everywhere in it."""
        values: dict[str, Template] = {}
        for node in template:
            if isinstance(node, Assignment) and not (node.keep and scope.get(node.name) is not None):
                once = node.once and (self.text(node.value, _beneath(scope, values)),)
                values[node.name] = once or node.value
        scope = scope.having(values)
        for node in template:
            if next(self.budget) > MAX_PIECES:
                raise UsageError(f"the prompt has over {MAX_PIECES:,} pieces")
            if isinstance(node, str):
                yield node
            elif isinstance(node, Wildcard):
                yield from self._wildcard(node, scope)
            elif isinstance(node, Variable):
                yield from self.texts(*_value(node, scope))
            elif isinstance(node, Wrap):
                yield _wrapped(self.text(node.wrapper, scope), self.text(node.inner, scope))
            elif isinstance(node, Choice):
                yield self._choice(node, scope)

    def _wildcard(self, node: Wildcard, scope: _Scope) -> Iterator[str]:
        own, lines = self._lines(node, scope)
        number = next(self.numbers)
        index = int(number * len(lines.templates)) if lines.equal else _picked(lines.weights, 1, iter([number]))[0]
        yield from self.texts(lines.templates[index], own)

    def _lines(self, node: Wildcard, scope: _Scope) -> tuple[_Scope, Lines]:
        _check_random(node)
        name = self.text(node.name, scope)
        own = scope.having(dict(node.variables)).within(name)
        return own, self.wildcards.lines(name)

    def _choice(self, node: Choice, scope: _Scope) -> str:
        _check_random(node)
        options, weights, own = node.options, node.weights, scope
        if node.sole_wildcard is not None:
            own, lines = self._lines(node.sole_wildcard, scope)
            options, weights = lines.templates, lines.weights
        low, high = _amounts(node, len(weights))
        count = low + int(next(self.numbers) * (high - low + 1))
        return node.separator.join(self.text(options[index], own) for index in _picked(weights, count, self.numbers))


def _amounts(node: Choice, count: int) -> tuple[int, int]:
    """The fewest and the most of a choice's options; of a wildcard's lines, as many as there are."""
    if node.low > count:
        raise UsageError(f"{{{node.low}$$...}}: so many cannot be taken of {count} lines")
    return node.low, min(node.high, count)


def _check_random(node: Choice | Wildcard) -> None:
    if node.sampler == "!":
        raise UsageError(f"{_sampled(node)} asks for every combination; --all-combinations generates them")
    if node.sampler == "@":
        raise UsageError(f"{_sampled(node)} takes its options one after the other, which is not supported")


def _sampled(node: Choice | Wildcard) -> str:
    return f"__{node.sampler}...__" if isinstance(node, Wildcard) else f"{{{node.sampler}...}}"


def _beneath(scope: _Scope, values: Mapping[str, Template]) -> _Scope:
    """The scope with values of the same template, where it has none: what is chosen once sees those around it first."""
    return scope.having({name: value for name, value in values.items() if scope.get(name) is None})


def _value(node: Variable, scope: _Scope) -> tuple[Template, _Scope]:
    """What a variable becomes, and the scope of that."""
    value = scope.get(node.name)
    if value is not None:
        return value, scope.within(f"${node.name}")
    if node.default is None:
        raise UsageError(
            f"the variable ${{{node.name}}} has no value; ${{{node.name}=...}} sets it, or ${{{node.name}:...}}"
        )
    return node.default, scope


def _wrapped(wrapper: str, inner: str) -> str:
    match = ELLIPSIS.search(wrapper)
    if match is None:
        raise UsageError(f"%{{{wrapper:.40}$$...}}: a wrap has dots ... where the text goes")
    return wrapper[: match.start()] + inner + wrapper[match.end() :]


def _picked(weights: Sequence[float], count: int, numbers: Iterable[float]) -> list[int]:
    """So many different options, by their weights, in the order in which they were picked."""
    left = dict(enumerate(weights))
    picked: list[int] = []
    for _, number in zip(range(count), numbers, strict=False):
        place = number * sum(left.values())
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
