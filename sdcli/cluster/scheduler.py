"""Which worker does which unit, how often a unit is tried, and which workers are not used any more. Pure: no Ray.

A unit that fails goes to the end of the queue, for a worker that has not tried it; after `ATTEMPTS` it has failed. So
what is sound comes first, and what kills workers last. Where what a unit needs cannot be loaded it is tried again at
once, before others that need the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sdcli.cluster.units import Unit, UnitFailed
from sdcli.errors import BadWeights, CannotWrite, NotFound, Offline, SdcliError, UsageError

ATTEMPTS = 3
"""A unit is tried once, and again at most twice."""
STRIKES = 3
"""A worker that fails so many different units in a row, while others succeed, is not used any more."""
HOPELESS = 10
"""The same where no worker succeeds: then the run ends."""
OF_LOADING = (BadWeights, NotFound, Offline, UsageError)
"""Failures of what a unit needs, which are the same for every unit with these needs."""

Verdict = Literal["keep", "retire"]


@dataclass
class _Attempts:
    """A unit, and what happened to it so far."""

    unit: Unit
    done: set[int] = field(default_factory=set)
    tried: dict[int, int] = field(default_factory=dict)
    """Which workers, and how often each had been started by then."""
    count: int = 0

    @property
    def left(self) -> tuple[int, ...]:
        return tuple(item for item in self.unit.items if item not in self.done)


@dataclass(frozen=True)
class UnitAssignment:
    """A unit for a worker."""

    unit: Unit
    done: frozenset[int]
    attempt: int
    renew: bool
    """Whether the worker has tried it before, so that it should be a new process."""


@dataclass
class _WorkerRecord:
    strikes: set[int] = field(default_factory=set)
    """Units that failed here since the last one that did not."""
    error: SdcliError | None = None
    """The failure of the last unit, where it failed."""
    starts: int = 0
    ready: bool = False
    proven: bool = False
    """Whether a unit has succeeded here."""
    busy: _Attempts | None = None


class UnitScheduler:
    """The queue of a run. `units` is consumed as needed, so a long run need not be in memory.

    Workers are numbers; a worker whose process was started again keeps its number. With `one_need` all units need the
    same, so where that cannot be loaded the run has failed.
    """

    def __init__(self, units: Iterable[Unit], *, one_need: bool = False) -> None:
        self._fresh: Iterator[Unit] = iter(units)
        self._again: deque[_Attempts] = deque()
        self._at_once: deque[_Attempts] = deque()
        self._workers: dict[int, _WorkerRecord] = {}
        self._unusable: dict[str, SdcliError] = {}
        self._failed: list[UnitFailed] = []
        self._one_need, self._exhausted = one_need, False
        self.patient = True
        """Whether workers that cannot write wait for those that have not started yet, instead of ending the run."""

    def expect(self, worker: int) -> None:
        """A worker is being started for the first time."""
        self._workers.setdefault(worker, _WorkerRecord())

    def ready(self, worker: int) -> None:
        """A worker has a new process, which takes units from now on."""
        state = self._workers.setdefault(worker, _WorkerRecord())
        state.ready, state.starts = True, state.starts + 1

    def away(self, worker: int) -> None:
        """The process of a worker is gone; another may come. Where it had a unit, `fail` or `give_back` came first."""
        self._workers.setdefault(worker, _WorkerRecord()).ready = False

    def retire(self, worker: int) -> None:
        """A worker is not used any more."""
        self._workers.pop(worker, None)

    def idle(self) -> list[int]:
        """The workers that can take a unit."""
        free = [number for number, state in self._workers.items() if state.ready and state.busy is None]
        if self._awaits_others():
            return [number for number in free if not isinstance(self._workers[number].error, CannotWrite)]
        return free

    def busy(self) -> list[int]:
        """The workers that have a unit."""
        return [number for number, state in self._workers.items() if state.busy is not None]

    def assign(self, worker: int) -> UnitAssignment | None:
        """The next unit for an idle worker; None where there is none for it now."""
        attempts = self._next_of(self._at_once, worker) or self._next_fresh() or self._next_of(self._again, worker)
        if attempts is None:
            return None
        state = self._workers[worker]
        renew = attempts.tried.get(worker) == state.starts
        attempts.tried[worker] = state.starts + renew  # the process that will do it
        attempts.count += 1
        state.busy = attempts
        return UnitAssignment(attempts.unit, frozenset(attempts.done), attempts.count, renew)

    def row(self, worker: int, item: int) -> bool:
        """An item is done; whether it is the first time."""
        attempts = self._busy(worker)
        if item in attempts.done:
            return False
        attempts.done.add(item)
        return True

    def finish(self, worker: int) -> None:
        """The attempt of a worker ended without an error; items without a row are an error of the function."""
        attempts = self._busy(worker)
        if attempts.left:
            self.fail(worker, SdcliError(f"a worker left {len(attempts.left)} items of a unit without a result"))
            return
        state = self._workers[worker]
        state.busy, state.error, state.proven = None, None, True
        state.strikes.clear()

    def fail(self, worker: int, error: SdcliError) -> Verdict:
        """The attempt of a worker failed; says whether the worker is to be used on.

        Raises the error where it is hopeless to go on: no worker can write, what every unit needs cannot be loaded, or
        nothing succeeds any more.
        """
        attempts, state = self._busy(worker), self._workers[worker]
        state.busy, state.error = None, error
        loading = isinstance(error, OF_LOADING) and bool(attempts.unit.needs)
        if not loading:  # which is not the worker's fault
            state.strikes.add(attempts.unit.number)
        if not attempts.left:  # it failed when everything was done already
            return self._verdict(state)
        if attempts.count < ATTEMPTS:
            (self._at_once if loading else self._again).append(attempts)
            return self._verdict(state)
        if loading:
            if self._one_need:
                raise error
            self._unusable[attempts.unit.needs] = error
        final = type(error)(f"{error} (tried {ATTEMPTS} times)")
        self._failed.append(UnitFailed(attempts.unit, attempts.left, final))
        return self._verdict(state)

    def give_back(self, worker: int) -> None:
        """A worker leaves its unit for a reason of its own, such as the end of its node before it began."""
        state = self._workers.get(worker)
        if state is not None and state.busy is not None:
            state.busy.count -= 1
            self._again.appendleft(state.busy)
            state.busy = None

    def unit_of(self, worker: int) -> Unit | None:
        """What a worker is doing."""
        state = self._workers.get(worker)
        return None if state is None or state.busy is None else state.busy.unit

    def take_failed(self) -> list[UnitFailed]:
        """The units that have failed for good since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def has_failed(self, unit: Unit) -> bool:
        """Whether a unit has failed for good, and `take_failed` will give it."""
        return any(failed.unit is unit for failed in self._failed)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, and nothing in work."""
        return (
            self._exhausted
            and not self._again
            and not self._at_once
            and all(one.busy is None for one in self._workers.values())
        )

    def _next_fresh(self) -> _Attempts | None:
        for unit in self._fresh:
            error = self._unusable.get(unit.needs)
            if error is None:
                return _Attempts(unit)
            self._failed.append(UnitFailed(unit, unit.items, error))
        self._exhausted = True
        return None

    def _next_of(self, queue: deque[_Attempts], worker: int) -> _Attempts | None:
        """A unit to try again that this worker has not tried or, where all have tried it, any."""
        for _ in range(len(queue)):
            attempts = queue.popleft()
            error = self._unusable.get(attempts.unit.needs)
            if error is not None:
                self._failed.append(UnitFailed(attempts.unit, attempts.left, error))
                continue
            if worker not in attempts.tried or all(one in attempts.tried for one in self._ready()):
                return attempts
            queue.append(attempts)
        return None

    def _ready(self) -> list[int]:
        return [number for number, state in self._workers.items() if state.ready]

    def _awaits_others(self) -> bool:
        """Whether there are workers that may be able to do what the others cannot, as they have not started yet."""
        return self.patient and any(not one.starts for one in self._workers.values())

    def _busy(self, worker: int) -> _Attempts:
        attempts = self._workers[worker].busy
        assert attempts is not None
        return attempts

    def _verdict(self, state: _WorkerRecord) -> Verdict:
        everyone = [one for one in self._workers.values() if one.starts]
        cannot_write = all(isinstance(one.error, CannotWrite) for one in everyone)
        if state.error is not None and cannot_write and not self._awaits_others():
            raise state.error
        sound = any(one.proven and not one.strikes for one in everyone)
        if sound and len(state.strikes) >= STRIKES:
            return "retire"
        if not sound and all(len(one.strikes) >= HOPELESS for one in everyone):
            assert state.error is not None
            raise type(state.error)(f"{HOPELESS} batches in a row failed on every worker, at last: {state.error}")
        return "keep"
