"""Signals while painting: the first asks the engine to stop after the picture in hand, the second stops at once."""

from __future__ import annotations

import signal
from types import FrameType

from sdcli.cli.console import Console
from sdcli.errors import Interrupted, Terminated


class GracefulStop:
    """Call it to learn whether, and why, to stop; `install` takes over SIGINT and SIGTERM."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reason: Interrupted | None = None

    def __call__(self) -> Interrupted | None:
        return self._reason

    def install(self) -> GracefulStop:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else Interrupted
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        if self._reason is not None:
            raise kind(f"{word}; finished pictures are kept")
        self._reason = kind(f"{word} after the picture in hand; finished pictures are kept")
        self._console.warn("finishing the picture in hand; once more stops at once")
