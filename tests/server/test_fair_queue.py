"""The queue of the server: clients take turns, and nobody waits forever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.server.fair_queue import OVERTAKEN, FairQueue, QueueFull


def queue_of(*items: str, limit: int = 1000) -> FairQueue[str]:
    """Items of clients: `a1` is the first of client a."""
    queue: FairQueue[str] = FairQueue(limit)
    for item in items:
        queue.put(item[0], item)
    return queue


def taken(queue: FairQueue[str]) -> list[str]:
    found = []
    while (item := queue.take()) is not None:
        found.append(item)
    return found


def test_clients_take_turns() -> None:
    queue = queue_of("a1", "a2", "a3", "b1", "c1", "b2")
    assert list(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert taken(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_full_queue_refuses() -> None:
    queue = queue_of("a1", "a2", limit=2)
    with pytest.raises(QueueFull):
        queue.put("b", "b1")
    queue.remove("a1")
    queue.put("b", "b1")


def test_what_suits_goes_first_but_the_client_in_front_is_not_overtaken_for_ever() -> None:
    queue = queue_of("b1", *(f"a{number}" for number in range(50)))
    order = []
    while "b1" not in order:
        first = queue.first(lambda item: item.startswith("a"))
        order.append(queue.take(lambda item: item.startswith("a")))
        assert order[-1] == first
    assert len(order) == OVERTAKEN + 1


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.integers(0, 40), max_size=5), st.sampled_from("abc"))
def test_every_item_is_taken_once_and_those_of_a_client_in_order(
    clients: list[str], removed: list[int], liked: str
) -> None:
    items = [f"{client}{number:02}" for number, client in enumerate(clients)]
    queue = queue_of(*items)
    gone = {items[number] for number in removed if number < len(items)}
    assert all(queue.remove(item) for item in gone)
    found = []
    while len(queue):
        found.append(queue.take(lambda item: item.startswith(liked)))
    assert sorted(map(str, found)) == sorted({*items} - gone)
    for client in "abc":
        own = [item for item in found if item is not None and item.startswith(client)]
        assert own == sorted(own)
