"""Command-line options made from the fields of a pydantic model, so that a field is described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.models import ArgumentInfo

from sdcli.cli.ui.help import interval, with_facts

Command = Callable[..., None]
KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Flag:
    """How a field is spelled on the command line. With `as_text` only the model parses its value, which may be text."""

    names: tuple[str, ...]
    section: str
    metavar: str | None = None
    as_text: bool = False


def field_options(
    model: type[BaseModel], flags: Mapping[str, Flag], *, sections: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Give a command an option for each field in `flags`; the typed values arrive as the keyword `typed`, a dict.

    A field that holds several values is an option that may be repeated. The help page
    has the `sections` in this order, and after them any other.
    """

    def decorate(function: Command) -> Command:
        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            values = {name: kwargs.pop(name) for name in flags}
            function(*args, **kwargs, typed={name: value for name, value in values.items() if value not in (None, [])})

        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "typed"]
        fields = {name: _annotation(model, name, flag) for name, flag in flags.items()}
        options = [inspect.Parameter(name, KEYWORD, default=None, annotation=kind) for name, kind in fields.items()]
        parameters = sorted((p.replace(kind=KEYWORD) for p in (*own, *options)), key=place)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    def place(parameter: inspect.Parameter) -> int:
        info = parameter.annotation.__metadata__[0]
        if isinstance(info, ArgumentInfo):
            return -1
        return sections.index(info.rich_help_panel) if info.rich_help_panel in sections else len(sections)

    return decorate


def _annotation(model: type[BaseModel], name: str, flag: Flag) -> Any:
    info = model.model_fields[name]
    kinds = [part for part in get_args(info.annotation) if part is not NoneType]
    kind: Any = kinds[0] if NoneType in get_args(info.annotation) else info.annotation
    if get_origin(kind) is tuple:
        kind = list[str]
    elif flag.as_text or not (kind in (bool, int, float, Path) or get_origin(kind) is Literal):
        kind = str
    text = info.description or ""
    bounds = {key: getattr(one, key) for one in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    closed = kind in (int, float) and not {"gt", "lt"} & set(bounds)  # Typer knows no open bounds; the model does
    default = "on" if info.default is True else info.default
    stated = default is None or default is False or default in ((), "") or "default" in text
    option = typer.Option(
        *flag.names,
        help=with_facts(f"{text[:1].upper()}{text[1:]}", "" if closed else interval(**bounds)),
        metavar=flag.metavar,
        rich_help_panel=flag.section,
        show_default=False if stated else str(default),
        min=bounds.get("ge") if closed else None,
        max=bounds.get("le") if closed else None,
    )
    return Annotated[kind | None, option]
