"""A run on a cluster: units to workers, rows and troubles back. Start reading here.

An attempt can be made more than once, as when a worker dies just after its last file was written, so the function that
does a unit must not mind finding its files there. Each item has exactly one `ItemDone`, or is in one `UnitFailed`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from sdcli.cluster.scheduler import UnitAssignment, UnitScheduler
from sdcli.cluster.units import (
    Attempt,
    FromWorker,
    ItemDone,
    ItemRow,
    Program,
    Remarked,
    RunEvent,
    Throughput,
    Trouble,
    Unit,
    UnitEnded,
    WorkerDied,
    WorkerReady,
    WorkerState,
    WorkerUnusable,
    Working,
    WorkRemark,
)
from sdcli.errors import CannotWrite, Interrupted, SdcliError, Stop, unpacked_error
from sdcli.io.temporary_files import temporary_path

WAIT = 0.2
"""Seconds between two looks for a signal while the workers work."""
EVERY = 1.0
"""Seconds between two reports of the throughput."""
STARTS = 3
"""A worker whose process dies so often before it is ready is not used any more."""
PATIENCE = 60.0
"""Seconds after which it is reported that no worker has started, and from which on such workers are not awaited."""


class ClusterEngine(Protocol):
    """What starts processes and carries messages; `RayEngine`, or a stand-in of the tests."""

    seconds: float
    workers: int
    device: str

    def start(self, number: int, program: Program) -> None: ...
    def submit(self, number: int, attempt: Attempt) -> None: ...
    def cancel(self, number: int) -> None: ...
    def kill(self, number: int) -> None: ...
    def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]: ...


def run_units(
    engine: ClusterEngine, scheduler: UnitScheduler, program: Program, *, stop: Stop, most: int | None = None
) -> Iterator[RunEvent]:
    """Do the units of a scheduler on the workers of an engine, of which no more than `most` are started.

    `stop` is called between messages and returns a reason to end, or None. Then the workers are told to stop, what
    they have finished still comes, and the reason is raised. Raises an error where it is hopeless to go on: no worker
    can be used, or what `UnitScheduler.fail` says.
    """
    workers = engine.workers if most is None else min(engine.workers, most)
    yield from _ClusterRun(engine, scheduler, program, stop).events(workers)


@contextlib.contextmanager
def probe_file(folder: Path) -> Iterator[Path]:
    """A file in the output folder, by which a worker knows that it sees the same folder. Raises CannotWrite."""
    path = temporary_path(folder, "probe")
    try:
        path.touch(exist_ok=False)
    except OSError as error:
        raise CannotWrite(f"cannot write into {folder}: {error.strerror}") from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


class _ProcessState:
    """What is known of the process of a worker."""

    def __init__(self) -> None:
        self.node, self.doing = "", "starting"
        self.share = 0.0
        """How much of its unit is done, beside its rows."""
        self.rows = 0
        """Rows that came from this worker."""
        self.rows_of_unit = 0
        self.failed_starts = 0
        self.held: UnitAssignment | None = None
        """A unit that waits until the process has been started anew."""


class _ClusterRun:
    def __init__(self, engine: ClusterEngine, scheduler: UnitScheduler, program: Program, stop: Stop) -> None:
        self._engine, self._scheduler, self._program, self._stop = engine, scheduler, program, stop
        self._processes: dict[int, _ProcessState] = {}
        self._stopping: Interrupted | None = None
        self._done = 0
        self._began = time.monotonic()
        self._first_ready: float | None = None
        self._seconds = {"engine": engine.seconds}
        self._error: SdcliError | None = None
        """Why the last worker that is not used any more is not."""

    def events(self, workers: int) -> Iterator[RunEvent]:
        for number in range(1, workers + 1):
            self._processes[number] = _ProcessState()
            self._scheduler.expect(number)
            self._engine.start(number, self._program)
        reported = 0.0
        while True:
            if self._stopping is None and (reason := self._stop()) is not None:
                self._stopping = reason
                self._cancel()
            if self._stopping is None:
                self._assign()
            yield from self._scheduler.take_failed()
            if not self._scheduler.busy() and (self._stopping is not None or self._scheduler.over):
                break
            if not self._processes:
                assert self._error is not None
                raise self._error
            for number, message in self._engine.poll(WAIT):
                yield from self._handle(number, message)
            if time.monotonic() - reported > EVERY:
                reported = time.monotonic()
                yield self._throughput()
            if self._scheduler.patient and time.monotonic() - self._began > PATIENCE:
                self._scheduler.patient = False
                if self._first_ready is None:
                    yield Trouble("no worker has started yet; the cluster may have no free CPUs or GPUs")
        yield self._throughput()
        if self._stopping is not None:
            raise self._stopping

    def _assign(self) -> None:
        for number in self._scheduler.idle():
            assignment = self._scheduler.assign(number)
            if assignment is None:
                continue
            if assignment.renew:
                self._processes[number].held = assignment
                self._restart(number)
            else:
                self._submit(number, assignment)

    def _submit(self, number: int, assignment: UnitAssignment) -> None:
        process, unit = self._processes[number], assignment.unit
        process.share, process.rows_of_unit, process.doing = 0.0, 0, ""
        self._engine.submit(number, Attempt(unit.payload, unit.items, assignment.done, assignment.attempt))

    def _restart(self, number: int) -> None:
        self._scheduler.away(number)
        self._processes[number].doing = "starting"
        self._engine.start(number, self._program)

    def _cancel(self) -> None:
        """Tell busy workers to stop, and end those that have not begun."""
        busy = self._scheduler.busy()
        for number, process in list(self._processes.items()):
            if number in busy and process.held is None:
                self._engine.cancel(number)
            else:
                self._scheduler.give_back(number)
                self._scheduler.retire(number)
                self._engine.kill(number)
                del self._processes[number]

    def _handle(self, number: int, message: FromWorker) -> Iterator[RunEvent]:
        process = self._processes.get(number)
        if process is None:
            return
        match message:
            case WorkerReady():
                self._ready(number, process, message)
            case WorkerUnusable(packed):
                error = unpacked_error(packed)
                yield from self._retire(number, error, f"worker {number} cannot be used: {error}")
            case ItemRow():
                unit = self._unit(number)
                if self._scheduler.row(number, message.item):
                    self._done += 1
                    process.rows += 1
                    process.rows_of_unit += 1
                    yield ItemDone(unit, message.item, message.values, number)
            case Working():
                process.share, process.doing = message.share, message.doing
            case WorkRemark():
                yield Remarked(message.text, message.items)
            case UnitEnded():
                process.share, process.rows_of_unit = 0.0, 0
                yield from self._ended(number, message)
            case WorkerDied():
                process.share, process.rows_of_unit = 0.0, 0
                yield from self._died(number, process, message.cause)

    def _ready(self, number: int, process: _ProcessState, ready: WorkerReady) -> None:
        process.node, process.failed_starts, process.doing = ready.node, 0, ""
        if self._first_ready is None:
            self._first_ready = time.monotonic()
            self._seconds["first worker"] = self._first_ready - self._began
        self._seconds["last worker"] = time.monotonic() - self._began
        self._seconds["program"] = max(self._seconds.get("program", 0.0), ready.seconds)
        self._scheduler.ready(number)
        if process.held is not None:
            held, process.held = process.held, None
            self._submit(number, held)

    def _ended(self, number: int, ended: UnitEnded) -> Iterator[RunEvent]:
        if self._stopping is not None:
            self._scheduler.give_back(number)
        elif ended.error is None:
            self._scheduler.finish(number)
        else:
            yield from self._failed(number, unpacked_error(ended.error), ended.trace)
            if ended.broken and number in self._processes:
                self._restart(number)

    def _died(self, number: int, process: _ProcessState, cause: str) -> Iterator[RunEvent]:
        where = f" on {process.node}" if process.node else ""
        error = SdcliError(f"worker {number}{where} died: {cause}")
        starting = process.doing == "starting"
        self._scheduler.away(number)
        if self._stopping is not None:
            self._scheduler.give_back(number)
            self._scheduler.retire(number)
            del self._processes[number]
            return
        if number in self._scheduler.busy():
            process.held = None
            yield from self._failed(number, error)
        elif starting:
            process.failed_starts += 1
            if process.failed_starts == STARTS:
                yield from self._retire(number, error, f"{error}; it is not started again")
                return
            yield Trouble(f"{error}; it is started again")
        if number in self._processes:
            self._restart(number)

    def _failed(self, number: int, error: SdcliError, trace: str = "") -> Iterator[RunEvent]:
        """An attempt failed: the unit is tried again or not, and the worker is used on or not."""
        unit = self._unit(number)
        verdict = self._scheduler.fail(number, error)
        left = "" if self._scheduler.has_failed(unit) else f"; {self._program.unit} {unit.number} is tried again"
        yield Trouble(f"{error}{left}", trace)
        if verdict == "retire":
            reason = f"worker {number} is not used any more: it failed again and again where others did not"
            yield from self._retire(number, error, reason)

    def _retire(self, number: int, error: SdcliError, text: str) -> Iterator[RunEvent]:
        if number in self._scheduler.busy():  # it was started again for a unit, which it cannot have now
            self._scheduler.fail(number, error)
        self._scheduler.retire(number)
        self._engine.kill(number)
        del self._processes[number]
        self._error = error
        yield Trouble(text)

    def _unit(self, number: int) -> Unit:
        unit = self._scheduler.unit_of(number)
        assert unit is not None
        return unit

    def _throughput(self) -> Throughput:
        states, part = [], 0.0
        for number, process in self._processes.items():
            unit = self._scheduler.unit_of(number)
            if unit is not None:
                part += max(0.0, process.share * len(unit.items) - process.rows_of_unit)
            states.append(WorkerState(number, process.node, process.rows, process.doing))
        begun = self._first_ready
        seconds = 0.0 if begun is None else time.monotonic() - begun
        return Throughput(
            done=self._done + part,
            rows=self._done,
            per_second=(self._done + part) / seconds if seconds > 0 else 0.0,
            workers=tuple(states),
            starting=sum(process.doing == "starting" for process in self._processes.values()),
            seconds=dict(self._seconds),
        )
