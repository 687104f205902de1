"""Signals during long work: the first stops it after the current image or step, the second at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from sdcli.cli.ui.console import Console
from sdcli.errors import Interrupted, Terminated


class GracefulStop:
    """Returns the reason to stop when called, or None; `install` handles SIGINT and SIGTERM."""

    def __init__(
        self,
        console: Console,
        *,
        unit: str = "the current image",
        kept: str = "finished images are kept",
        echo: float = 0.0,
    ) -> None:
        """`echo`: seconds within which a second signal is ignored as a duplicate of the first."""
        self._console = console
        self._echo, self._first = echo, 0.0
        self._unit, self._kept = unit, kept
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
            if time.monotonic() - self._first < self._echo:
                return
            raise kind(f"{word}; {self._kept}")
        self._first = time.monotonic()
        self._reason = kind(f"{word} after {self._unit}; {self._kept}")
        self._console.warn(f"stopping after {self._unit}; press Ctrl-C again to stop at once")
