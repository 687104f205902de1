"""The flags of a training command, made from its settings, so that a setting is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from sdcli.training.settings import TrainSettings

SHORT = {"model": ("-m",)}


def settings_options(kind: type[TrainSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per setting; what was typed arrives as the keyword `typed`, a dict."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            values = {name: kwargs.pop(name) for name in kind.model_fields}
            typed = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v not in (None, [])}
            function(*args, **kwargs, typed=typed)

        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "typed"]
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(kind, name))
            for name in kind.model_fields
        ]
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
        return command

    return decorate


def _annotation(kind: type[TrainSettings], name: str) -> Any:
    info = kind.model_fields[name]
    extra: Any = info.json_schema_extra
    value_type = _plain(info.annotation)
    flag = f"--{name.replace('_', '-')}"
    flags = (flag, *extra["also"])
    names = tuple(f"{one}/--no-{one[2:]}" for one in flags) if value_type is bool else flags
    bounds: dict[str, Any] = {}
    for constraint in info.metadata:
        bounds |= {"min": constraint.ge} if hasattr(constraint, "ge") else {}
        bounds |= {"max": constraint.le} if hasattr(constraint, "le") and name != "seed" else {}
    default = info.default
    shown = (
        f" ({default})" if default not in (None, (), "", False, True) and "(" not in (info.description or "") else ""
    )
    description = info.description or ""
    option = typer.Option(
        *names,
        *SHORT.get(name, ()),
        help=f"{description[:1].upper()}{description[1:]}{shown}.",
        metavar=_metavar(value_type, name),
        rich_help_panel=extra["panel"],
        show_default=False,
        **bounds,
    )
    return Annotated[value_type | None, option]


def _plain(annotation: Any) -> Any:
    """The type without None, and a list for a tuple of any length."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is tuple:
        return list[str]  # Typer knows no lists of choices; the settings check them
    return annotation


def _metavar(value_type: Any, name: str) -> str | None:
    if value_type is Path:
        return "DIR"
    return {"model": "MODEL", "vae": "MODEL", "text_encoder": "MODEL", "from_scratch": "CONFIG"}.get(name)
