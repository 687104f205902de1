"""A run on a cluster whose units need nothing loaded beyond what the workers begin with: its rows as results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sdcli.cluster.ray_engine import ClusterSettings, RayEngine
from sdcli.cluster.run import ClusterEngine, probe_file, run_units
from sdcli.cluster.scheduler import UnitScheduler
from sdcli.cluster.units import ItemDone, Program, Remarked, Throughput, Trouble, Unit, UnitFailed
from sdcli.errors import Stop

R = TypeVar("R")


def results_on_cluster(
    work: Callable[[ClusterEngine, Path], tuple[Iterator[Unit], Program]],
    cluster: ClusterSettings,
    folder: Path,
    *,
    done: Callable[[ItemDone], Iterator[R]],
    failed: Callable[[UnitFailed], Iterator[R]],
    stop: Stop,
) -> Iterator[R | Trouble | Throughput]:
    """The results that `done` and `failed` make of the rows, and what the user is to see of the rest.

    `work` gives the units and the program, from the engine and the probe file in the output `folder`. Raises the reason
    of `stop`, what `run_units` raises, and CannotWrite.
    """
    with RayEngine(cluster) as engine, probe_file(folder) as probe:
        units, program = work(engine, probe)
        first = list(itertools.islice(units, engine.workers))  # no more workers than units
        if not first:
            return
        scheduler = UnitScheduler(itertools.chain(first, units))
        for event in run_units(engine, scheduler, program, stop=stop, most=len(first)):
            match event:
                case ItemDone():
                    yield from done(event)
                case UnitFailed():
                    yield from failed(event)
                case Remarked(text=text):
                    yield Trouble(text)
                case Trouble() | Throughput():
                    yield event
