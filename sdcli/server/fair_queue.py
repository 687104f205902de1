"""A bounded queue in which each client has its turn, however much another one has submitted."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFull(Exception):
    """The queue takes no more for now."""


class FairQueue(Generic[Item]):
    """Clients take turns; the items of one client keep their order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        """Client -> its items; the client in front is next."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """The items in the order in which they will be taken."""
        lines = [list(line) for line in self._waiting.values()]
        for turn in range(max(map(len, lines), default=0)):
            yield from (line[turn] for line in lines if turn < len(line))

    def put(self, client: str, item: Item) -> None:
        """Add an item behind those of this client. Raises QueueFull."""
        if len(self) >= self.limit:
            raise QueueFull
        self._waiting.setdefault(client, deque()).append(item)

    def take(self, suits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """Remove and return the first item whose turn it is, or of those in front of their clients one that suits.

        An item that suits goes first only among those in front of the clients' lines, so no client waits for more than
        one turn of each other. None where the queue is empty.
        """
        if not self._waiting:
            return None
        client = next((name for name, line in self._waiting.items() if suits(line[0])), next(iter(self._waiting)))
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
                    del self._waiting[client]
                return True
        return False
