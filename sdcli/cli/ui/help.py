"""Help pages in plain text: options by section, ranges and defaults as people write them; and what is refused."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sdcli.errors import in_own_words

LONGEST_NAME = 26
"""Columns for the names of options; the help of a longer one begins on the next line."""
LONGEST_KIND = 50
"""Columns for the values to choose from; more of them stand in the help."""
WIDEST = 110
"""Columns of a help page on a wide terminal."""
OTHER = "Other options"
ENDLESS = 2**53
"""An upper bound as large as this is not worth a mention."""
METAVARS = {"int": "N", "float": "NUMBER", "str": "TEXT", "path": "PATH"}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = in_own_words(error.message)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(option_sections(self, ctx), formatter)


class Group(TyperGroup):
    """A group of commands; without any, it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            print(self.get_help(ctx))
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(self.sections(), formatter)
        _write(option_sections(self, ctx), formatter)

    def sections(self) -> dict[str, list[tuple[str, str]]]:
        """What the help page lists: heading -> (name, first sentence) of each command."""
        return command_sections(self)


class App(typer.Typer):
    """A Typer app whose help pages are those of this module."""

    def __init__(self, *, cls: type[Group] = Group, **options: Any) -> None:
        super().__init__(cls=cls, rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Like Typer's."""
        return super().command(name, cls=_Command, **options)


def command_sections(group: Any) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (name, first sentence) of each command."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, command in group.commands.items():
        if not command.hidden:
            first = " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())
            sections.setdefault(command.rich_help_panel or "Commands", []).append((name, first))
    return sections


def option_sections(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (names with metavar, help) of each argument and option; those without a heading come last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    other: list[tuple[str, str]] = []
    for parameter in command.get_params(ctx):
        if parameter.hidden:
            continue
        argument = parameter.param_type_name == "argument"
        panel = parameter.rich_help_panel or ("Arguments" if argument else None)
        rows = other if panel is None else sections.setdefault(panel, [])
        rows.append((_names(parameter, ctx), _help(parameter, ctx)))
    return {**sections, (OTHER if set(sections) - {"Arguments"} else "Options"): other} if other else sections


def interval(
    *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
) -> str:
    """A range in words: `1 to 1000`, `0 or more`, `above 0`, `0 to below 1`; nothing where there are no bounds."""
    low = f"{ge}" if ge is not None else f"above {gt}" if gt is not None else ""
    high = f"{le}" if le is not None and le < ENDLESS else f"below {lt}" if lt is not None else ""
    if low and high:
        return f"{low} to {high}"
    if high:
        return high if lt is not None else f"at most {high}"
    return f"{low} or more" if ge is not None else low


def with_facts(text: str, *facts: str) -> str:
    """`Denoising steps (1 to 1000; default: 20).` Facts join a default or parentheses that the text ends with."""
    plain = text[:-1] if text.endswith(".") and not text.endswith("...") else text
    plain = re.sub(r"; (default: [^;()]*|random if omitted)$", r" (\1)", plain)
    match = re.fullmatch(r"(.*) \(([^()]*)\)", plain, re.DOTALL)
    plain, earlier = match.groups() if match else (plain, "")
    known = "; ".join(sorted(filter(None, (*facts, earlier)), key=lambda fact: fact.startswith("default")))
    return f"{plain} ({known})." if known else f"{plain}."


def _names(parameter: Any, ctx: Any) -> str:
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    names = ", ".join(sorted(parameter.opts, key=lambda name: name.startswith("--")))
    off = "".join(f" / {name}" for name in parameter.secondary_opts)
    if [name.replace("--", "--no-", 1) for name in parameter.opts] == parameter.secondary_opts:
        names, off = ", ".join(name.replace("--", "--[no-]", 1) for name in parameter.opts), ""
    kind = "" if parameter.is_flag else parameter.metavar or _kind(parameter, ctx)
    return f"{names}{off} {kind if len(kind) <= LONGEST_KIND else 'NAME'}".rstrip()


def _kind(parameter: Any, ctx: Any) -> str:
    """`N`, `TEXT`, or the values to choose from: `auto|off`."""
    plain = parameter.display_type(ctx).strip("<>").removeprefix("list[").removesuffix("]").removesuffix(" range")
    return METAVARS.get(plain, plain)


def _help(parameter: Any, ctx: Any) -> str:
    shown, default, kind = parameter.show_default, parameter.default, _kind(parameter, ctx)
    if not isinstance(shown, str):
        shown = "" if not shown or default in (None, False, ()) else str(default)
    return with_facts(
        parameter.help or "",
        f"one of {kind.replace('|', ', ')}" if len(kind) > LONGEST_KIND and parameter.metavar is None else "",
        interval(ge=parameter.min, le=parameter.max),
        f"default: {shown}" if shown else "",
        "required" if parameter.required and parameter.param_type_name == "option" else "",
    )


def _write(sections: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    for heading, rows in sections.items():
        formatter.write(f"\n{typer.style(heading, bold=True)}:\n")
        width = min(LONGEST_NAME, max(len(name) for name, _ in rows))
        margin = " " * (2 + width + 2)
        for name, text in rows:
            lines = textwrap.wrap(text, formatter.width - len(margin), break_on_hyphens=False)
            first = f"  {name}\n{margin}" if len(name) > width else f"  {name:{width}}  "
            formatter.write(first + f"\n{margin}".join(lines) + "\n")
