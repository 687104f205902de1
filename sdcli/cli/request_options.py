"""The flags of a request, made from `GenerationRequest` itself, so that a field is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from sdcli.request import GenerationRequest

NOT_FLAGS = {"schema_version", "prompt"}
ALSO_SPELLED = {"guidance_scale": ("--cfg-scale",), "scheduler": ("--sampler",), "model": ("-m",)}
PANELS = {
    "model": "Model and prompt",
    "refiner": "Model and prompt",
    "negative_prompt": "Model and prompt",
    "prompt_template": "Model and prompt",
}
METAVARS = {
    "model": "MODEL",
    "refiner": "MODEL",
    "scheduler": "NAME",
    "negative_prompt": "TEXT",
    "prompt_template": "TEXT",
}


def request_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of the request; what was typed arrives as the keyword `typed`, a dict."""

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        typed = {name: kwargs.pop(name) for name in _fields()}
        function(*args, **kwargs, typed={name: value for name, value in typed.items() if value is not None})

    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "typed"]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
        for name in _fields()
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def _fields() -> list[str]:
    return [name for name in GenerationRequest.model_fields if name not in NOT_FLAGS]


def _annotation(name: str) -> Any:
    info = GenerationRequest.model_fields[name]
    kind = next(part for part in get_args(info.annotation) if part is not NoneType)
    bounds: dict[str, Any] = {}
    for constraint in info.metadata:
        bounds |= {"min": constraint.ge} if hasattr(constraint, "ge") else {}
        bounds |= {"max": constraint.le} if hasattr(constraint, "le") and name != "seed" else {}
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        *ALSO_SPELLED.get(name, ()),
        help=f"{info.description}.".capitalize() if info.description else None,
        metavar=METAVARS.get(name),
        rich_help_panel=PANELS.get(name, "The picture"),
        show_default=False,
        **bounds,
    )
    return Annotated[kind | None, option]
