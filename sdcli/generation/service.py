"""The generation service: jobs in, files and events out. The command line, the self-test and other fronts drive it.

plan (batches) -> ModelCache.lease (networks) -> run_batch (images) -> Writer (files). A front that keeps no files, as
a server or a trainer, uses the first three: `generate_images` shows how.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sdcli.errors import (
    BadWeights,
    NotFound,
    Offline,
    SdcliError,
    Stop,
    UsageError,
    stop_if_asked,
)
from sdcli.generation.events import Cancelled, Event, Failed, Generated, Note, Phase, Result
from sdcli.generation.image_file import image_file
from sdcli.generation.model_cache import Lease, ModelCache
from sdcli.generation.observers import observers_for
from sdcli.generation.plan import Batch, Limits, models_of, plan
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.run_batch import OF_ONE_IMAGE, IsCancelled, never, run_batch
from sdcli.generation.writer import Writer

_OF_LOADING = (BadWeights, NotFound, Offline, UsageError)
"""Failures of a model, or of anything that is added to it."""


def generate(
    jobs: Sequence[ResolvedJob],
    cache: ModelCache,
    writer: Writer,
    *,
    stop: Stop = lambda: None,
    cancelled: IsCancelled = never,
    over: Collection[int] = (),
    written: Mapping[int, Path] = MappingProxyType({}),
) -> Iterator[Event]:
    """Generate every job, or those of the writer's shard, and write its image; yields one Result for each of them.

    Where the writer resumes an earlier run, finished jobs are skipped. Batches are planned over all jobs, finished ones
    included, so that a resumed run generates the missing images with the same batch mates, and so to the same bytes,
    as an uninterrupted one. `stop` is called between batches and returns a reason to end, or None; `cancelled` is
    called between steps for each job. Where this run continues what another process began, `over` are the indices of
    the jobs that need no Result any more, and `written` the images of others, which lack side files alone. Raises the
    reason to end, an error that concerns every job (the only model cannot be loaded), and CannotWrite.
    """
    batches, note = writer.divided(plan(jobs, cache.limits))
    if note:
        yield Note(note, ())
    own = {job.index for batch in batches for job in batch.jobs}
    images = {**writer.finished(jobs, own), **written}
    done = {index for index, path in images.items() if all(file.exists() for file in writer.side_files(path))}
    done.update(over)
    # without its only model there is nothing to continue with
    one_model = len({models_of(batch.jobs[0]) for batch in batches}) == 1
    unloadable: dict[tuple[str | None, ...], SdcliError] = {}
    for whole in batches:
        for job in whole.jobs:
            if job.index in done and job.index not in over:
                yield Result("skipped", job, path=images[job.index], side_files=writer.side_files(images[job.index]))
        batch = whole.without(done)
        if not batch.wanted:
            continue
        stop_if_asked(stop)
        writer.begin(batch.wanted_jobs)
        job, error = batch.jobs[0], unloadable.get(models_of(batch.jobs[0]))
        with contextlib.ExitStack() as stack:
            if error is None:
                if not cache.has_models(job):
                    yield Phase("load", tuple(sorted(batch.wanted)), job.request.model)
                try:
                    lease = stack.enter_context(cache.lease(job))
                except _OF_LOADING as problem:
                    error = problem
                    if not cache.has_models(job):  # else the problem is of these requests alone, such as a LoRA
                        if one_model:
                            raise
                        unloadable[models_of(job)] = error
            if error is None:
                stop_if_asked(stop)
                yield from _generate_batch(lease, batch, writer, images, cancelled, cache.run.strict_prompt)
            else:
                yield from (Result("failed", one, error=error) for one in batch.wanted_jobs)
    stop_if_asked(stop)


def generate_images(lease: Lease, jobs: Sequence[ResolvedJob], limits: Limits) -> list[Generated]:
    """The images of jobs, in their order, with networks that are at hand; no files.

    They have the pixels that `sdcli generate` gives with these weights, device, dtype and batch size. Raises the first
    error of an image: UsageError, BadOutput, OutOfMemory and those of the files that a request names.
    """
    generated: dict[int, Generated] = {}
    for batch in plan(jobs, limits):
        for event in run_batch(lease, batch):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Generated):
                generated[event.job.index] = event
    return [generated[job.index] for job in jobs]


def _generate_batch(
    lease: Lease,
    batch: Batch,
    writer: Writer,
    images: Mapping[int, Path],
    cancelled: IsCancelled,
    strict_prompt: bool,
) -> Iterator[Event]:
    """The events of one batch, its images written; of jobs that have `images` already only side files are missing."""
    observers = observers_for(writer.output)
    for event in run_batch(lease, batch, cancelled=cancelled, observers=observers, strict_prompt=strict_prompt):
        match event:
            case Generated():
                yield from _write(event, lease, writer, images.get(event.job.index))
            case Failed():
                yield Result("flagged" if event.flagged else "failed", event.job, error=event.error)
            case Cancelled():
                yield Result("cancelled", event.job)
            case _:
                yield event


def _write(generated: Generated, lease: Lease, writer: Writer, existing: Path | None) -> Iterator[Event]:
    """Write one image, unless it is `existing`, and its side files."""
    began, path = time.monotonic(), existing
    side_files: tuple[Path, ...] = ()
    try:
        if path is None:
            yield Phase("save", generated.jobs)
            data, _ = image_file(lease.pipeline, generated, writer.output)
            path = writer.write(generated.job, data)
        if writer.side_files(path):
            yield Phase("explain", generated.jobs)
            side_files = writer.write_side_files(path, generated.side_files, replace=existing is not None)
    except OF_ONE_IMAGE as error:
        yield Result("failed", generated.job, path=path, error=error)
        return
    seconds = generated.seconds + time.monotonic() - began
    yield Result("done", generated.job, path, seconds, generated.fallbacks, side_files=side_files)
