"""The flags of `sdcli generate`, one per field of the request, and the command line that generates a given request."""

from __future__ import annotations

import re

from sdcli.cli.options.flags import Flag
from sdcli.request.schema import GenerationRequest, flag_of

MODEL, IMAGE, START, CONTROL = "Model and prompt", "The image", "Init image", "ControlNet"
NOT_FLAGS = {"schema_version", "prompt"}
ALIASES = {"guidance_scale": ("--cfg-scale",), "scheduler": ("--sampler",), "model": ("-m",)}
SECTIONS = {
    **dict.fromkeys(("model", "refiner", "negative_prompt", "prompt_template", "prompt_syntax", "clip_skip"), MODEL),
    **dict.fromkeys(("embeddings", "loras", "ip_adapters"), MODEL),
    **dict.fromkeys(("init_image", "strength", "mask", "mask_blur", "invert_mask", "extend"), START),
    **dict.fromkeys(("controls", "guess_mode"), CONTROL),
}
METAVARS = {
    "model": "MODEL",
    "refiner": "MODEL",
    "scheduler": "NAME",
    **dict.fromkeys(("width", "height", "mask_blur"), "PIXELS"),
    "embeddings": "FILE[=WORD]",
    "guidance_scale": "NUMBER|FIRST..LAST",
    "guidance_interval": "START-STOP",
    "reuse": "N",
    "init_image": "FILE|-",
    "mask": "FILE|-",
    "extend": "SIDE=PIXELS,...",
    "upscale": "FACTORx[:STRENGTH[:latent]]",
    "loras": "FILE[:WEIGHT[:TEXT_WEIGHT]]",
    "ip_adapters": "FILE=IMAGE[:WEIGHT]",
    "controls": "[HOW:]MODEL=IMAGE[:WEIGHT][@START-END]",
}


def _flag(name: str) -> Flag:
    return Flag(
        (flag_of(name), *ALIASES.get(name, ())),
        SECTIONS.get(name, IMAGE),
        METAVARS.get(name),
        as_text=name == "guidance_scale",  # a number, or the first and the last of a schedule
    )


FLAGS = {name: _flag(name) for name in GenerationRequest.model_fields if name not in NOT_FLAGS}


def request_arguments(request: GenerationRequest) -> list[str]:
    """The arguments of `sdcli generate` for exactly this request: a flag per given field, then the prompt.

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
