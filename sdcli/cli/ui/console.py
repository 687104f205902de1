"""Output of the command line: results on stdout, notes and warnings on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
_UNDECODABLE = re.compile(r"[\udc80-\udcff]")
"""Bytes of a path or an argument that are not UTF-8, as Python holds them."""


@dataclass(frozen=True)
class Console:
    """How much to print, and whether results are JSON lines."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def note(self, text: str) -> None:
        """Print a line on stderr, unless -q was given."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Print a line on stderr if -v was given."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, even with -q."""
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def result(self, text: str | Path, after: str = "", /, **fields: Any) -> None:
        """Print a result on stdout at once: a line of text, or with --json the fields as an object.

        A path, with text `after` it, is for another program: the bytes of its name, unless stdout is a terminal.
        Raises CannotWrite, and ReaderGone where the reader of a pipe has closed it.
        """
        if self.json:
            sys.stdout.write(json.dumps(fields) + "\n")
        elif isinstance(text, Path) and not sys.stdout.isatty() and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(text) + after.encode() + b"\n")
        else:
            sys.stdout.write(printable(f"{text}{after}") + "\n")
        sys.stdout.flush()


def printable(text: str) -> str:
    """Text without control characters and direction marks, which could deceive on a terminal.

    Bytes that are not UTF-8 are written as \\xe9.
    """
    text = _UNDECODABLE.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", _CONTROL.sub("�", text))
    return text.encode(errors="backslashreplace").decode()


def readable_json(value: Any) -> str:
    """JSON with the letters of every script as they are, and escapes for what stdout or a terminal cannot show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def safe(letter: str) -> bool:
        try:
            letter.encode(encoding)
        except (UnicodeError, LookupError):
            return False
        return not _CONTROL.match(letter)

    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isascii() or safe(letter) else json.dumps(letter)[1:-1] for letter in text)


def plain_terminal() -> bool:
    """Whether stderr cannot show moving or coloured text."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
