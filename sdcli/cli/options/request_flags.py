"""The flags of a request, made from `GenerationRequest` itself, so that a field is written once; and read backwards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from sdcli.request.fields import Part
from sdcli.request.schema import GenerationRequest, flag_of, is_list

NOT_FLAGS = {"schema_version", "prompt"}
ALSO_SPELLED = {"guidance_scale": ("--cfg-scale",), "scheduler": ("--sampler",), "model": ("-m",)}
SPELLED = {"guidance_scale"}
"""Numbers that may also be written otherwise; `GenerationRequest` reads them."""
PANELS = {
    **dict.fromkeys(
        ("model", "refiner", "negative_prompt", "prompt_template", "prompt_syntax", "clip_skip", "embeddings", "loras"),
        "Model and prompt",
    ),
    "ip_adapters": "Model and prompt",
    **dict.fromkeys(("init_image", "strength", "mask", "mask_blur", "invert_mask", "extend"), "Start image"),
    **dict.fromkeys(("controls", "guess_mode"), "Control"),
}
METAVARS = {
    "model": "MODEL",
    "refiner": "MODEL",
    "scheduler": "NAME",
    "negative_prompt": "TEXT",
    "prompt_template": "TEXT",
    "embeddings": "FILE[=WORD]",
    "guidance_scale": "NUMBER|FIRST..LAST",
    "guidance_interval": "START-STOP",
    "init_image": "FILE|-",
    "mask": "FILE|-",
    "extend": "SIDE=PIXELS,...",
    "upscale": "FACTORx[:STRENGTH[:latent]]",
    "loras": "FILE[:WEIGHT[:TEXT_WEIGHT]]",
    "ip_adapters": "FILE=IMAGE[:WEIGHT]",
    "controls": "[HOW:]MODEL=IMAGE[:WEIGHT][@START-END]",
}


def request_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of the request; what was typed arrives as the keyword `typed`, a dict.

    A field that holds several is an option in the singular that may be typed several times (`loras`: `--lora`).
    """

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        typed = {name: kwargs.pop(name) for name in _fields()}
        function(*args, **kwargs, typed={name: value for name, value in typed.items() if value not in (None, [])})

    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "typed"]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
        for name in _fields()
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def request_arguments(request: GenerationRequest) -> list[str]:
    """What to type after `sdcli generate` for exactly this request: a flag per field that was given, the prompt last.

    A boolean is a flag where it is true, a list repeats its flag.
    """
    arguments: list[str] = []
    for name, value in request:
        if name in NOT_FLAGS or value is None:
            continue
        if isinstance(value, bool):
            arguments += [flag_of(name)] if value else []
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            arguments += [flag_of(name), str(one)]
    return [*arguments, "--", request.prompt]  # after `--` even "-rf" is a prompt


def command_line(request: GenerationRequest) -> str | None:
    """The line for a POSIX shell that generates a request; None where a text is longer than Linux lets an argument be.

    One line that is safe to paste, whatever the texts hold: a raw control character could end a terminal's paste or
    its line, and a direction mark could show another command than the one that runs.
    """
    arguments = request_arguments(request)
    if max(len(argument.encode()) for argument in arguments) >= _MAX_ARGUMENT:
        return None
    return " ".join(["sdcli", "generate", *map(_quoted, arguments)])


_MAX_ARGUMENT = 128 * 1024
"""Bytes of one argument with its closing NUL: MAX_ARG_STRLEN in Linux's binfmts.h, with pages of 4 KiB."""


def _quoted(word: str) -> str:
    """A word for bash, zsh and other POSIX shells; what cannot be seen becomes octal bytes in `$'...'` (POSIX 2024).

    Not shlex.quote: it leaves `=` bare, which zsh expands, and control characters raw.
    """
    if re.fullmatch(r"[\w%+,./:@-]+", word, re.ASCII):
        return word
    if word.isprintable():
        return "'" + word.replace("'", "'\"'\"'") + "'"
    return "$'" + "".join(one if one.isprintable() and one not in "'\\!" else _octal(one) for one in word) + "'"


def _octal(letter: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in letter.encode())


def _fields() -> list[str]:
    return [name for name in GenerationRequest.model_fields if name not in NOT_FLAGS]


def _annotation(name: str) -> Any:
    info = GenerationRequest.model_fields[name]
    kind = next(part for part in get_args(info.annotation) if part is not NoneType)
    spelled = name in SPELLED or (isinstance(kind, type) and issubclass(kind, Part))
    bounds: dict[str, Any] = {}
    for constraint in () if spelled else info.metadata:
        bounds |= {"min": constraint.ge} if hasattr(constraint, "ge") else {}
        bounds |= {"max": constraint.le} if hasattr(constraint, "le") and name != "seed" else {}
    option = typer.Option(
        flag_of(name),
        *ALSO_SPELLED.get(name, ()),
        help=f"{info.description[0].upper()}{info.description[1:]}." if info.description else None,
        metavar=METAVARS.get(name),
        rich_help_panel=PANELS.get(name, "The image"),
        show_default=False,
        **bounds,
    )
    if is_list(name):
        return Annotated[list[str] | None, option]
    return Annotated[(str if spelled else kind) | None, option]
