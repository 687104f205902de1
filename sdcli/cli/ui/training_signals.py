"""Signals during training: those that save and end the run, and SIGUSR1, which saves and lets it go on.

Batch systems and terminals differ in what they send before they kill: SLURM sends SIGUSR1, SIGUSR2 or SIGTERM, docker
SIGTERM, a terminal that closes SIGHUP, each perhaps twice or one after the other.
"""

from __future__ import annotations

import contextlib
import signal
import time
from types import FrameType

from sdcli.cli.ui.console import Console
from sdcli.cli.ui.signals import GracefulStop
from sdcli.errors import Interrupted, Terminated
from sdcli.training.orders import SaveRequest

ENDING = ("SIGHUP", "SIGUSR2")
"""Save and end, as SIGTERM does, but are no second request to stop at once: systems send them beside SIGTERM."""
SAVING = "SIGUSR1"


class TrainingStop(GracefulStop):
    """Returns the reason to stop when called, or None; `save` asks for a checkpoint. `install` handles the signals."""

    def __init__(self, console: Console, *, kept: str, echo: float = 0.0) -> None:
        super().__init__(console, unit="the current step", kept=kept, echo=echo)
        self.save = SaveRequest()
        self._direct = False
        """Whether SIGINT or SIGTERM came, so that another one stops at once."""

    def install(self) -> TrainingStop:
        super().install()
        for name in (*ENDING, SAVING):
            number = getattr(signal, name, None)
            ignored = name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
            if number is not None and not ignored:
                signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == SAVING:
            self.save.wanted = True
            self._tell(f"saving a checkpoint after {self._unit}, then going on ({name})")
        elif name in ENDING:
            if self._reason is None:
                self._reason = Terminated(f"terminated by {name} after {self._unit}; {self._kept}")
                self._tell(f"stopping after {self._unit} ({name})")
        elif self._direct:
            if time.monotonic() - self._first >= self._echo:
                kind, word = (Terminated, "terminated") if name == "SIGTERM" else (Interrupted, "interrupted")
                raise kind(f"{word}; {self._kept}")
        else:
            self._direct, self._first = True, time.monotonic()
            kind, word = (Terminated, "terminated") if name == "SIGTERM" else (Interrupted, "interrupted")
            self._reason = self._reason or kind(f"{word} after {self._unit}; {self._kept}")
            self._tell(f"stopping after {self._unit}; press Ctrl-C again to stop at once")

    def _tell(self, text: str) -> None:
        """Print it, unless the terminal has gone, or was being printed on when the signal came."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._console.warn(text)
