"""What the driver and the workers of a cluster exchange, and what the driver reports: plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sdcli.errors import SdcliError

PackedError = tuple[list[str], str]
"""An error as `errors.packed_error` gives it."""


@dataclass(frozen=True)
class Unit:
    """Some items that a worker does in one go, such as the images of a batch. Each item gets exactly one row."""

    number: int
    items: tuple[int, ...]
    """Numbers of the items, each in one unit of the run."""
    payload: Any
    """What the worker's function gets: plain values that can be pickled, and that say everything."""
    needs: str = ""
    """What has to be loaded for it, such as a model; where that fails for good, no unit with the same is tried."""


@dataclass(frozen=True)
class Program:
    """What the workers of a run do: a function by name, and what it gets once in each worker.

    `start` is `package.module:function`. It is called with `setup` when a worker process begins, after torch has its
    threads, and returns the function that does an `Attempt`. Errors that it raises make this worker unusable.
    """

    start: str
    setup: Any
    folder: str
    """The folder where the command was started; workers change to it, so relative paths mean the same."""
    probe: str | None = None
    """A file that the driver made; a worker that does not see it has another disk, and is not used."""
    unit: str = "batch"
    """What a unit is called in sentences."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a unit, as the worker's function gets it."""

    payload: Any
    items: tuple[int, ...]
    done: frozenset[int]
    """Items that have their rows from an earlier attempt."""
    number: int
    """Counted from 1. From 2 on, an earlier attempt may have written files whose rows were lost."""


@dataclass(frozen=True)
class ItemRow:
    """What became of one item, as plain values: its file is whole on the disk."""

    item: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Working:
    """How much of the unit is done, 0..1, between its rows."""

    share: float
    doing: str = ""


@dataclass(frozen=True)
class WorkRemark:
    """A sentence for the user about the work on a unit, such as a prompt that was cut."""

    text: str
    items: tuple[int, ...] = ()


FromWork = ItemRow | Working | WorkRemark
Work = Callable[[Attempt, Callable[[], bool]], Iterator[FromWork]]
"""The function that `Program.start` returns, called with an attempt and with `cancelled`.

`cancelled()` is to be asked often, as between denoising steps; where it is true the function just returns. It
raises an SdcliError, or anything, where the unit cannot be finished here; its rest is then tried on another worker.
What is wrong with an item itself belongs in its row.
"""


# From a worker to the driver


@dataclass(frozen=True)
class WorkerReady:
    """A worker can take units."""

    node: str
    pid: int
    seconds: float
    """From the start of the process's own work until now: imports, and the program's `start`."""


@dataclass(frozen=True)
class WorkerUnusable:
    """A worker cannot take units, and why."""

    error: PackedError


@dataclass(frozen=True)
class UnitEnded:
    """The attempt at the unit is over; `error` says why items may be left."""

    error: PackedError | None = None
    broken: bool = False
    """Whether the process may be damaged: an exception that nobody foresaw."""
    trace: str = ""


@dataclass(frozen=True)
class WorkerDied:
    """The process of a worker is gone, and why as far as it is known."""

    cause: str


FromWorker = WorkerReady | WorkerUnusable | FromWork | UnitEnded | WorkerDied


# From the driver to who drives it


@dataclass(frozen=True)
class ItemDone:
    """A row has come, once for each item."""

    unit: Unit
    item: int
    values: dict[str, Any]
    worker: int


@dataclass(frozen=True)
class UnitFailed:
    """The items of a unit that have no row, after the last attempt."""

    unit: Unit
    items: tuple[int, ...]
    error: SdcliError


@dataclass(frozen=True)
class Remarked:
    """A sentence from the work on a unit."""

    text: str
    items: tuple[int, ...]


@dataclass(frozen=True)
class Trouble:
    """A worker died, or is used no more; a unit is tried again. For the user, as nothing is lost yet."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class WorkerState:
    """One worker for the display."""

    number: int
    node: str
    items: int
    """Items that have come from it."""
    doing: str


@dataclass(frozen=True)
class Throughput:
    """How the run goes, about once a second."""

    done: float
    """Items done, and the parts of those in work."""
    rows: int
    """Items that came from workers so far."""
    per_second: float
    """Of the items since the first worker was ready."""
    workers: tuple[WorkerState, ...]
    starting: int
    """Workers that are not ready yet."""
    seconds: dict[str, float]
    """How long the engine took to start and, of the first and the last worker so far, the workers."""


RunEvent = ItemDone | UnitFailed | Remarked | Trouble | Throughput
