"""The samples of each step, a pure function of the seed and the step, so that a run can be resumed exactly.

Each bucket (images of one size) is an endless stream of epochs, each in a random order of its own. A step takes the
next samples of one bucket. The number of steps of each bucket is exact over time, without repeats and leftovers: after
k rounds a bucket of n images has had floor(k * n / batch) steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sdcli.io import rng
from sdcli.training.task import Draw

Size = tuple[int, int] | None


@dataclass(frozen=True)
class Order:
    """The order of samples of a run.

    `buckets`: size -> indices of its items, int64 [n], not empty. `blocks`: the shard of each item of the data set, for
    sharded sets; their items are shuffled within a window of `buffer`, so that shards are read from front to back.
    """

    buckets: Mapping[Size, np.ndarray]
    batch: int
    seed: int
    blocks: np.ndarray | None = None
    buffer: int = 10_000
    _streams: Mapping[Size, _Stream] = field(init=False, repr=False)
    _rounds: dict[int, list[tuple[Size, int]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        streams = {
            size: _Stream(
                indices,
                self.seed,
                f"order {size}",
                self.blocks[indices] if self.blocks is not None else None,
                self.buffer,
            )
            for size, indices in sorted(self.buckets.items(), key=lambda entry: str(entry[0]))
        }
        object.__setattr__(self, "_streams", streams)
        object.__setattr__(self, "_rounds", {})

    def __len__(self) -> int:
        """The number of items of an epoch."""
        return sum(len(stream.indices) for stream in self._streams.values())

    def draws(self, step: int) -> list[Draw]:
        """The `batch` samples of a step."""
        number = self._round_with(step)
        if number not in self._rounds:
            self._rounds.clear()
            self._rounds[number] = self._round(number)
        size, turn = self._rounds[number][step - self._steps_before(number)]
        first = turn * self.batch
        return [
            Draw(counter=step * self.batch + place, index=self._streams[size].item(first + place), size=size)
            for place in range(self.batch)
        ]

    def _steps_before(self, number: int) -> int:
        """The number of steps before a round."""
        return sum(number * len(stream.indices) // self.batch for stream in self._streams.values())

    def _round_with(self, step: int) -> int:
        """The round of a step, by bisection, as the number of steps before a round never decreases."""
        low, high = 0, 1
        while self._steps_before(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low

    def _round(self, number: int) -> list[tuple[Size, int]]:
        """The steps of a round in order: (bucket, number of the bucket's earlier steps in the run)."""
        turns = [
            (size, turn)
            for size, stream in self._streams.items()
            for turn in range(
                number * len(stream.indices) // self.batch, (number + 1) * len(stream.indices) // self.batch
            )
        ]
        places = rng.permutation(self.seed, number, "buckets", len(turns))
        mixed = [turns[place][0] for place in places]
        following = {size: iter([turn for other, turn in turns if other == size]) for size in self._streams}
        return [(size, next(following[size])) for size in mixed]


@dataclass
class _Stream:
    """The endless stream of a bucket's n items: position p is position p % n of epoch p // n."""

    indices: np.ndarray
    seed: int
    purpose: str
    blocks: np.ndarray | None
    buffer: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    def item(self, position: int) -> int:
        epoch, place = divmod(position, len(self.indices))
        if epoch not in self._epochs:
            self._epochs = {number: order for number, order in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._epoch(epoch)
        return int(self.indices[self._epochs[epoch][place]])

    def _epoch(self, epoch: int) -> np.ndarray:
        if self.blocks is None:
            return rng.permutation(self.seed, epoch, self.purpose, len(self.indices))
        return windowed_shuffle(self.blocks, self.seed, epoch, self.purpose, buffer=self.buffer)


def windowed_shuffle(blocks: np.ndarray, seed: int, epoch: int, purpose: str, *, buffer: int) -> np.ndarray:
    """A permutation of 0..n-1 that goes through blocks in random order and mixes items within a window of `buffer`.

    It does what a bounded shuffle buffer does to a stream, as a pure function: every item is delayed by 0 to `buffer`
    positions, and the items are sorted by the result.
    """
    names, number_of = np.unique(blocks, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[rng.permutation(seed, epoch, f"{purpose} blocks", len(names))] = np.arange(len(names))
    in_blocks = np.argsort(rank[number_of], kind="stable")
    bits = np.random.Philox(key=rng.key(seed, epoch, f"{purpose} late")).random_raw(len(blocks))
    late = bits.astype(np.float64) / 2**64 * buffer
    return in_blocks[np.argsort(np.arange(len(blocks)) + late, kind="stable")]
