"""The command line of `sdcli generate` for a given request, safe to paste into a shell."""

from __future__ import annotations

import re

from sdcli.request.schema import GenerationRequest, flag_of

NOT_FLAGS = {"schema_version", "prompt"}
"""Fields of a request that are no flags; the prompt is an argument."""


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


def command_line(request: GenerationRequest, *, num_images: int = 1) -> str | None:
    """The line for a POSIX shell that generates a request; None where a text is longer than Linux lets an argument be.

    One line that is safe to paste, whatever the texts hold: a raw control character could end a terminal's paste or
    its line, and a direction mark could show another command than the one that runs.
    """
    count = ["--num-images", str(num_images)] if num_images > 1 else []
    arguments = [*count, *request_arguments(request)]
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
