"""A bounded queue in which each client has its turn, however much another one has submitted."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

OVERTAKEN = 4
"""How often others that suit better go before the client whose turn it is."""


class QueueFull(Exception):
    """The queue takes no more for now."""


class FairQueue(Generic[Item]):
    """Clients take turns; the items of one client keep their order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        """Client -> its items; the client in front is next."""
        self._overtaken = 0
        """How often the client in front has been passed over."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """The items in the order in which they will be taken, where all suit equally."""
        lines = [list(line) for line in self._waiting.values()]
        for turn in range(max(map(len, lines), default=0)):
            yield from (line[turn] for line in lines if turn < len(line))

    def check_room(self) -> None:
        """Raise QueueFull where `put` would."""
        if len(self) >= self.limit:
            raise QueueFull

    def put(self, client: str, item: Item) -> None:
        """Add an item behind those of this client. Raises QueueFull."""
        self.check_room()
        self._waiting.setdefault(client, deque()).append(item)

    def first(self, suits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The item that `take` would return; None where the queue is empty."""
        return self._waiting[self._next(suits)][0] if self._waiting else None

    def take(self, suits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """Remove and return the item whose turn it is; None where the queue is empty.

        Of the items in front of the clients' lines one that suits goes first, but the client whose turn it is is
        overtaken so at most `OVERTAKEN` times.
        """
        if not self._waiting:
            return None
        client = self._next(suits)
        self._overtaken = 0 if client == next(iter(self._waiting)) else self._overtaken + 1
        line = self._waiting.pop(client)
        item = line.popleft()
        if line:
            self._waiting[client] = line  # behind all others
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out of the queue; whether it was there."""
        for client, line in self._waiting.items():
            if item in line:
                line.remove(item)
                if not line:
                    if client == next(iter(self._waiting)):
                        self._overtaken = 0
                    del self._waiting[client]
                return True
        return False

    def _next(self, suits: Callable[[Item], bool]) -> str:
        """The client whose item is taken next."""
        front = next(iter(self._waiting))
        if self._overtaken >= OVERTAKEN:
            return front
        return next((client for client, line in self._waiting.items() if suits(line[0])), front)
