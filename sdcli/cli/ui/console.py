"""Output of the command line: results on stdout, notes and warnings on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


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

    def result(self, text: str, **fields: Any) -> None:
        """Print a result on stdout at once: a line of text, or with --json the fields as an object."""
        line = json.dumps(fields) if self.json else printable(text)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def printable(text: str) -> str:
    """Text without control characters and direction marks, which could deceive on a terminal."""
    return _CONTROL.sub("�", text).encode(errors="replace").decode()


def plain_terminal() -> bool:
    """Whether stderr cannot show moving or coloured text."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
