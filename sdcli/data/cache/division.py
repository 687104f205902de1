"""How the work of filling a cache is divided: into units that processes claim, and into shards of a run.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sdcli.data.buckets import Size
from sdcli.data.cache.claims import Claims
from sdcli.errors import Stop, stop_if_asked
from sdcli.generation.run_shard import RunShard

if TYPE_CHECKING:
    from sdcli.data.cache.store import TensorStore

MOST_OF_UNIT = 256
"""Images or texts that are claimed at once."""
UNITS = 256
"""So many units there should be at least, for as many processes."""
WAITING = "waiting for what other processes encode for this cache"

U = TypeVar("U")


def images_at_once(device: str) -> int:
    """Images of one size that are encoded together on a kind of device: more are not faster on the CPU."""
    return 1 if device == "cpu" else 8


def texts_at_once(device: str) -> int:
    """Texts that are encoded together: one on the CPU, where the states are bit for bit those of `generate`."""
    return 1 if device == "cpu" else 64


def unit_length(count: int, batch: int) -> int:
    """The length of a unit of `count` images: whole batches, the same for all who fill the cache with these images."""
    wanted = min(MOST_OF_UNIT, -(-count // UNITS))
    return max(1, -(-wanted // batch)) * batch


def chunks_by_size(sizes: Sequence[Size] | np.ndarray, length: int) -> list[np.ndarray]:
    """The places of images of equal size, `length` together; chunks in the order of their first images."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, size in enumerate(sizes):
        groups.setdefault(tuple(int(side) for side in size), []).append(place)
    chunks = [
        np.array(group[start : start + length], dtype=np.int64)
        for group in groups.values()
        for start in range(0, len(group), length)
    ]
    return sorted(chunks, key=lambda chunk: int(chunk[0]))


def places_of_shard(sizes: Sequence[Size] | np.ndarray, shard: RunShard, *, batch: int) -> np.ndarray:
    """The places of the images of one shard, ascending: each n-th batch of a run that fills an empty cache."""
    own = list(shard.part(chunks_by_size(sizes, batch)))
    return np.sort(np.concatenate(own)) if own else np.zeros(0, dtype=np.int64)


def in_parts(values: Sequence[U], length: int) -> list[Sequence[U]]:
    """The values in their order, `length` together, the last ones fewer."""
    return [values[start : start + length] for start in range(0, len(values), length)]


class Division:
    """The units of a process that fills a store, claimed one after the other where there are `claims`.

    A claim is held until the records of its unit are on the disk.
    """

    def __init__(self, store: TensorStore, claims: Claims | None, stop: Stop) -> None:
        self._store, self._claims, self._stop = store, claims, stop
        self._encoded: list[str] = []

    def turns(
        self, units: Iterable[U], *, name: Callable[[U], str], is_done: Callable[[U], bool]
    ) -> Iterator[U | None]:
        """The units to encode; None where there is nothing to do but to wait for other processes.

        `is_done` looks into the store, as far as it is refreshed here.
        """
        if self._claims is None:
            yield from units
            return
        for unit in self._claims.turns(units, name=name, is_done=is_done):
            stop_if_asked(self._stop)
            if unit is None:
                self.flush()
                self._store.refresh()
                yield None
                continue
            self._store.refresh()  # the last holder of the claim may have done it
            if not is_done(unit):
                yield unit
            self._encoded.append(name(unit))
            if not self._store.pending:
                self.flush()

    def flush(self) -> None:
        """Write what was encoded, and give back the claims of it."""
        self._store.flush()
        if self._claims is not None:
            self._claims.release(self._encoded)
        self._encoded = []
