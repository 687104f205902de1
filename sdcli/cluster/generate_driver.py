"""Images on a cluster, the driver's side: batches become units, rows become results. Imports no torch.

The batches are planned once, over all jobs, so an image has the same batch mates, and with them the same bytes, whoever
generates it and whenever. Of jobs that are not in memory, such as `JobSpool` gives, only those in work are read.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdcli.cluster.ray_engine import ClusterSettings, RayEngine
from sdcli.cluster.run import ClusterEngine, probe_file, run_units
from sdcli.cluster.scheduler import UnitScheduler
from sdcli.cluster.units import ItemDone, Program, Remarked, Throughput, Trouble, Unit, UnitFailed
from sdcli.errors import Interrupted, Stop, unpacked_error
from sdcli.generation.events import Note, Result
from sdcli.generation.journal import Journal
from sdcli.generation.plan import Batch, BatchPlaces, Limits, models_of
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.writer import Writer

WORKER = "sdcli.cluster.generate_worker:start"


@dataclass(frozen=True)
class GenerateSetup:
    """What the workers of a run need to know once."""

    run: RunSettings
    output: OutputSettings
    on_gpu: bool
    """What the batches were planned for."""
    part: str
    """The beginning of the names of this run's parts of the journal."""
    begun: tuple[str, int]
    """The prompts file, and its base seed."""


@dataclass(frozen=True)
class BatchOrder:
    """The payload of a unit: jobs that are denoised together, and the names of the images that are to be written."""

    jobs: tuple[ResolvedJob, ...]
    names: Mapping[int, str]


ClusterEvent = Result | Note | Trouble | Throughput


def generate(
    jobs: Sequence[ResolvedJob],
    run: RunSettings,
    output: OutputSettings,
    journal: Journal,
    cluster: ClusterSettings,
    *,
    begun: tuple[str, int],
    stop: Stop,
) -> Iterator[ClusterEvent]:
    """Generate every job on a cluster; yields one Result for each job, as `service.generate` does.

    `begun` are the prompts file and its base seed. Where the output resumes an earlier run, finished jobs are skipped,
    and where nothing is left no cluster is started. Raises the reason of `stop`, an error that concerns every job, and
    CannotWrite.
    """
    if output.resume:
        journal.take_in_parts()
    writer = Writer(output, journal)
    finished = writer.finished(jobs)
    for job in jobs:
        if job.index in finished:
            yield Result("skipped", job, path=finished[job.index])
    if len(finished) == len(jobs):
        return
    with RayEngine(cluster) as engine:
        limits = Limits(run.batch_size, on_gpu=engine.device == "cuda")
        yield from generate_on(
            engine, jobs, replace(run, device=engine.device), writer, journal, limits, finished, begun, stop
        )


def generate_on(
    engine: ClusterEngine,
    jobs: Sequence[ResolvedJob],
    run: RunSettings,
    writer: Writer,
    journal: Journal,
    limits: Limits,
    finished: Mapping[int, Path],
    begun: tuple[str, int],
    stop: Stop,
) -> Iterator[ClusterEvent]:
    """The same on an engine, without what is `finished`; the batches are planned for the `limits` of its devices."""
    output, part = writer.output, secrets.token_hex(4)
    places = BatchPlaces(jobs, limits)
    units = _units(jobs, places, finished, writer)
    first = list(itertools.islice(units, engine.workers))  # no more workers than units
    scheduler = UnitScheduler(itertools.chain(first, units), one_need=places.models == 1)
    entries: list[dict[str, object]] = []  # safe in the workers' parts of the journal, so they can wait for a second
    with probe_file(output.outdir) as probe:
        setup = GenerateSetup(run, output, limits.on_gpu, part, begun)
        program = Program(WORKER, setup, os.getcwd(), str(probe))
        over = False
        try:
            for event in run_units(engine, scheduler, program, stop=stop, most=len(first)):
                match event:
                    case ItemDone():
                        if "entry" in event.values:
                            entries.append(event.values["entry"])
                        yield _result(event, output.outdir)
                    case UnitFailed():
                        wanted = set(event.items)
                        failed = (job for job in event.unit.payload.jobs if job.index in wanted)
                        yield from (Result("failed", job, error=event.error) for job in failed)
                    case Remarked():
                        yield Note(event.text, event.items)
                    case Throughput():
                        journal.add(entries)
                        entries.clear()
                        yield event
                    case Trouble():
                        yield event
            over = True
        except Interrupted as reason:
            over = reason is stop()  # else it came in the middle, and workers may still write
            raise
        finally:
            journal.add(entries)
            if over:
                for number in range(1, engine.workers + 1):
                    engine.kill(number)
                journal.remove_parts(f"{part}-")


def _units(
    jobs: Sequence[ResolvedJob], plan: Iterable[Sequence[int]], finished: Container[int], writer: Writer
) -> Iterator[Unit]:
    """The units of batches, made as they are needed, so that only the jobs of those in work are in memory.

    Names are chosen in the order of the plan, which no worker can change.
    """
    number = 0
    for places in plan:
        batch = Batch.of([jobs[place] for place in places]).without(finished)
        if not batch.wanted:
            continue
        wanted, number = batch.wanted_jobs, number + 1
        order = BatchOrder(batch.jobs, writer.reserve(wanted))
        needs = " ".join(name for name in models_of(batch.jobs[0]) if name is not None)
        yield Unit(number, tuple(job.index for job in wanted), order, needs)


def _result(done: ItemDone, outdir: Path) -> Result:
    job = next(job for job in done.unit.payload.jobs if job.index == done.item)
    values = done.values
    if "error" in values:
        return Result(values["status"], job, error=unpacked_error(values["error"]))
    return Result("done", job, outdir / values["path"], values["seconds"], tuple(values["fallbacks"]))
