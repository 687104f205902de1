"""The commands that wait for their turn with a worker of --keep-warm, each of which is told its place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from sdcli.server.warm.messages import Gone, Message, Wire


class WaitingCommands:
    """First come, first served. `add` is called in one thread, `take` in another one."""

    def __init__(self) -> None:
        self._waiting: deque[Wire] = deque()
        self._changed = threading.Condition()
        self._serving = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, wire: Wire, greeting: Callable[[int], Message]) -> None:
        """Greet a command with its place, 0 where nothing is before it, and let it wait. Raises Gone."""
        with self._changed:
            wire.send(*greeting(len(self._waiting) + self._serving))
            self._waiting.append(wire)
            self._changed.notify()

    def take(self, seconds: float) -> Wire | None:
        """The first command, which is served until the next call; None where none comes within that time."""
        with self._changed:
            self._serving = False
            if not self._changed.wait_for(lambda: self._waiting, seconds):
                return None
            self._serving = True
            first = self._waiting.popleft()
            self._tell_places()
            return first

    def _tell_places(self) -> None:
        """Tell those who wait their places; those who have gone lose theirs."""
        here: deque[Wire] = deque()
        for wire in self._waiting:
            try:
                wire.send("place", len(here) + 1)
            except Gone:
                wire.close()
            else:
                here.append(wire)
        self._waiting = here
