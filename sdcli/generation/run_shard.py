"""`--shard i/n`: which batches of a run one of several processes carries out, where no engine hands them out.

Every process makes the same plan and takes each n-th batch of it, so that together they carry out each batch once, with
the batch mates, and so to the bytes, of one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

from sdcli.errors import UsageError

MOST = 1_000_000
BASE_SEED = 0
"""The base seed of runs in shards: processes that do not talk to each other cannot agree on a random one."""
_FORM = re.compile(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*")

T = TypeVar("T")


@dataclass(frozen=True)
class RunShard:
    """Shard number `index`, from 1, of the `count` shards of a run."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Self:
        """From `2/8`. Raises UsageError."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise UsageError(f"--shard takes a shard's number and how many there are, such as 2/8, not {text!r}")
        index, count = int(match[1]), int(match[2])
        if not 1 <= count <= MOST:
            raise UsageError(f"--shard {text}: there may be 1 to {MOST:,} shards")
        if not 1 <= index <= count:
            hint = "; torchrun's RANK and Kubernetes' JOB_COMPLETION_INDEX count from 0, so add 1" if index == 0 else ""
            raise UsageError(f"--shard {text}: the shards are 1/{count} to {count}/{count}{hint}")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """For the names of files."""
        return f"shard-{self.index}-of-{self.count}"

    def takes(self, number: int) -> bool:
        """Whether unit `number` of the plan, from 0, belongs to this shard."""
        return number % self.count == self.index - 1

    def part(self, units: Iterable[T]) -> Iterator[T]:
        """The units of this shard, in their order."""
        return (unit for number, unit in enumerate(units) if self.takes(number))


WHOLE = RunShard(1, 1)
"""The one shard of a run that is not divided."""
