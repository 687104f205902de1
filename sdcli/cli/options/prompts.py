"""The prompts of `sdcli generate`: from arguments or a file, with the alternatives of dynamic prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sdcli.errors import UsageError
from sdcli.models.registry import Registry
from sdcli.request.jobs import DYNAMIC, Line, combinations, read_lines
from sdcli.request.sweep import Axis
from sdcli.request.wildcards import Wildcards


def prompt_lines(
    prompts: Sequence[str], prompts_file: str | None, typed: Mapping[str, Any], registry: Registry
) -> Iterable[Line]:
    """A line per prompt or, read as they are needed, per entry of the file.

    Raises UsageError where a model needs a prompt and there is none.
    """
    if prompts_file is not None:
        if prompts:
            raise UsageError("use either prompts or --prompts-file")
        return read_lines(prompts_file)
    if not prompts and "prompt" not in typed:
        spec = registry.find(typed.get("model"))
        if spec.kind.classes:
            raise UsageError(f"nothing to generate; name a class: {spec.kind.listed_classes}")
        if spec.family.takes_prompt:
            raise UsageError('nothing to generate; try: sdcli generate "an astronaut riding a horse"')
    return [Line(0, {"prompt": prompt}) for prompt in prompts] or [Line(0, {})]


def dynamic_lines(
    lines: Iterable[Line], typed: Mapping[str, Any], axes: Sequence[Axis], choices: Wildcards, *, all_combinations: bool
) -> list[Line]:
    """The lines, or a line for each combination. Raises UsageError if no prompt has alternatives."""
    if all_combinations and any(axis.field in DYNAMIC for axis in axes):
        raise UsageError("use either --all-combinations or a --sweep of prompts")
    lines = list(lines)
    texts = [{**typed, **line.fields}.get(name) for line in lines for name in DYNAMIC]
    texts += [value for axis in axes if axis.field in DYNAMIC for value in axis.values]
    if not any(_may_choose(choices, text) for text in texts if isinstance(text, str)):
        raise UsageError("no prompt has alternatives, such as {red|blue} or __animals__")
    return list(combinations(lines, dict(typed), choices)) if all_combinations else lines


def left_as_text(lines: Iterable[Line], typed: Mapping[str, Any], note: Callable[[str], None]) -> Iterator[Line]:
    """The lines; the first alternatives in their prompts are noted, as none are chosen without --dynamic-prompts."""
    noted = False
    for line in lines:
        texts = () if noted else ({**typed, **line.fields}.get(name) for name in DYNAMIC)
        found = next(filter(None, (_ALTERNATIVES.search(text) for text in texts if isinstance(text, str))), None)
        if found is not None:
            noted = True
            option = "--wildcards DIR" if found[0].startswith("__") else "--dynamic-prompts"
            note(f"{found[0]} is text in the prompt; with {option} one of its alternatives is chosen")
        yield line


_ALTERNATIVES = re.compile(
    r"\{[^{}|\n]{0,60}\|[^{}\n]{0,60}\}|(?<![\w\\])__[^\W_](?:[\w/* -]{0,60}[^\W_]|[*]?)__(?!\w)"
)


def _may_choose(choices: Wildcards, text: str) -> bool:
    """Whether a prompt has alternatives; a malformed one counts, as its error is reported with its job."""
    try:
        return choices.has_choices(text)
    except UsageError:
        return True
