"""Progress of a run on a cluster: a bar with a line for each worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import ProgressBar

if TYPE_CHECKING:
    from sdcli.cluster.units import Throughput, WorkerState

SHOWN = 8
"""Workers with a line of their own; of more, only how many there are."""


class ClusterProgress:
    """What a run's throughput looks like. `things` are its items, such as images."""

    def __init__(self, bar: ProgressBar, console: Console, *, things: str) -> None:
        self._bar, self._console, self._things = bar, console, things
        self._started = self._announced = False
        self._last: Throughput | None = None

    def show(self, now: Throughput, *, total: int) -> None:
        """Show the state of a run of `total` items."""
        ready = len(now.workers) - now.starting
        if not self._started:
            self._started = True
            self._bar.start(f"starting {_count(len(now.workers), 'worker')}", total)
            self._console.note(f"starting {_count(len(now.workers), 'worker')}")
        if ready == len(now.workers) and not self._announced:
            self._announced = True
            self._console.detail(
                f"the cluster took {now.seconds['engine']:.1f} s to start, after which its first worker was ready in "
                f"{now.seconds['first worker']:.1f} s, its last in {now.seconds['last worker']:.1f} s"
            )
        self._last = now
        speed = f"{now.per_second:.2f} {self._things}/s"
        left = f", {(total - now.done) / now.per_second:.0f} s left" if now.per_second > 0 else ""
        each = ", ".join(str(worker.items) for worker in now.workers[:SHOWN])
        more = f", and {len(now.workers) - SHOWN} more" if len(now.workers) > SHOWN else ""
        self._bar.update(
            int(now.done),
            total,
            description=f"{_count(ready, 'worker')} of {len(now.workers)}",
            note=f"{speed}{left}",
            footer="\n".join([*(_line(worker, self._things) for worker in now.workers[:SHOWN]), more[2:]]).rstrip(),
            line=f"{now.rows} of {total} {self._things}, {speed}{left}; by worker: {each}{more}",
        )

    def end(self) -> None:
        """Print what each worker did."""
        if self._last is not None:
            for worker in self._last.workers:
                self._console.detail(_line(worker, self._things))


def _line(worker: WorkerState, things: str) -> str:
    where = f" on {worker.node}" if worker.node else ""
    doing = f", {worker.doing}" if worker.doing else ""
    return f"worker {worker.number}{where}: {worker.items} {things}{doing}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
