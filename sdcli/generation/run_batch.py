"""One batch of jobs in, events out. Uses no files, no signals and nothing global.

Images whose prompts have different lengths are denoised in groups of equal length. Where memory runs out a group is
halved. A job that is cancelled, or fails, leaves the batch without changing the bytes of the others: its row is
computed to the end, unless no other job is left, but it is not decoded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import check_request, sample
from sdcli.errors import BadImage, BadLatents, BadOutput, BadWeights, NotFound, OutOfMemory, UsageError
from sdcli.generation.events import (
    BatchEvent,
    Cancelled,
    Failed,
    Generated,
    Note,
    Phase,
    Progress,
    SideFile,
)
from sdcli.generation.model_cache import Lease
from sdcli.generation.observers.observer import Observer, Recording
from sdcli.generation.observers.preview import preview_or_none, previews_or_none
from sdcli.generation.plan import Batch
from sdcli.generation.prompt_notes import prompt_notes
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.images.watermark import with_watermark
from sdcli.io.out_of_memory import MemoryAttempt
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.decode import decode_with_fallbacks

OF_ONE_IMAGE = (UsageError, NotFound, BadWeights, BadImage, BadLatents, BadOutput, OutOfMemory)
"""Failures of one image, or of those that are denoised with it; the rest of the batch continues."""

IsCancelled = Callable[[ResolvedJob], bool]


def never(job: ResolvedJob) -> bool:
    """No job is cancelled."""
    return False


def run_batch(
    lease: Lease,
    batch: Batch,
    *,
    cancelled: IsCancelled = never,
    observers: Sequence[Observer] = (),
    strict_prompt: bool = False,
) -> Iterator[BatchEvent]:
    """Denoise a batch and decode the wanted images of it; yields one Generated, Failed or Cancelled for each of them.

    `cancelled(job)` is called before the first step, after each step, and before an image is decoded. With
    `strict_prompt` a prompt that would be cut fails its job. Raises only errors that concern no single image.
    """
    yield from (Note(text, _indices(batch.wanted_jobs)) for text in lease.notes)
    wanted = _Wanted(set(batch.wanted), cancelled)
    groups: dict[Hashable, list[ResolvedJob]] = {}
    for job in batch.jobs:
        try:
            shape = lease.pipeline.encode.shape(job.request)
            notes = prompt_notes(lease.pipeline, job.request, strict=strict_prompt)
            check_request(lease.pipeline, job.request)
            if job.request.masked:
                notes += lease.pipeline.inputs.init_image(job.request).notes
            groups.setdefault(shape, []).append(job)
            if job in wanted:
                yield from (Note(text, (job.index,)) for text in notes)
                for observer in observers:
                    observer.check(lease.pipeline, job.request)
        except OF_ONE_IMAGE as error:  # where only an observer refuses it, it still is computed along with the others
            yield from wanted.failed([job], error)
    for jobs in groups.values():
        yield from _run_group(lease, jobs, wanted, observers)


class _Wanted:
    """The jobs of a batch whose images are still wanted: not yet failed or cancelled."""

    def __init__(self, indices: set[int], cancelled: IsCancelled) -> None:
        self._indices, self._cancelled = indices, cancelled

    def __contains__(self, job: ResolvedJob) -> bool:
        return job.index in self._indices

    def of(self, jobs: Sequence[ResolvedJob]) -> list[ResolvedJob]:
        """The wanted ones among these jobs."""
        return [job for job in jobs if job in self]

    def failed(self, jobs: Sequence[ResolvedJob], error: Exception) -> Iterator[Failed]:
        """These jobs are no longer wanted; yields an event for each that was."""
        for job in self.of(jobs):
            self._indices.discard(job.index)
            yield Failed(job, error)  # type: ignore[arg-type]  # one of OF_ONE_IMAGE

    def without_cancelled(self, jobs: Sequence[ResolvedJob]) -> Iterator[Cancelled]:
        """Drops those of these jobs that are cancelled; yields an event for each."""
        for job in self.of(jobs):
            if self._cancelled(job):
                self._indices.discard(job.index)
                yield Cancelled(job)


@dataclass(frozen=True)
class _Denoised:
    """The outcome of denoising a group: finished latents [B, C, h, w], or None where no job was left to the end."""

    latents: Tensor | None
    recordings: Sequence[Recording] = ()
    notes: tuple[str, ...] = ()


def _run_group(
    lease: Lease, jobs: list[ResolvedJob], wanted: _Wanted, observers: Sequence[Observer]
) -> Iterator[BatchEvent]:
    """Denoise and decode jobs of equal shape, in halves where memory runs out."""
    groups, fallbacks = [jobs], ()  # type: tuple[list[list[ResolvedJob]], tuple[str, ...]]
    while groups:
        group = groups.pop(0)
        began, count = time.monotonic(), len(wanted.of(group))
        if not count:
            continue
        attempt, denoised = MemoryAttempt(), None
        try:
            with attempt:
                denoised = yield from _denoise(lease, group, wanted, observers)
        except OF_ONE_IMAGE as error:
            yield from wanted.failed(group, error)
            continue
        if attempt.ran_out():
            if len(group) == 1:
                too_large = OutOfMemory("out of memory while denoising a single image; try a smaller --size")
                yield from wanted.failed(group, too_large)
                continue
            half = (len(group) + 1) // 2
            groups = [group[:half], group[half:], *groups]
            fallbacks = (*fallbacks, f"batch of {len(group)} halved: out of memory while denoising")
            text = f"out of memory with {len(group)} images at once; continuing with {half}"
            yield Note(text, _indices(wanted.of(group)))
            continue
        if denoised is not None and denoised.latents is not None:
            share = (time.monotonic() - began) / count
            yield from _decode(lease, group, wanted, denoised, fallbacks, share)


def _denoise(
    lease: Lease, group: list[ResolvedJob], wanted: _Wanted, observers: Sequence[Observer]
) -> Generator[BatchEvent, None, _Denoised]:
    pipeline, requests = lease.pipeline, [job.request for job in group]
    yield from wanted.without_cancelled(group)
    if not wanted.of(group):
        return _Denoised(None)
    yield Phase("encode", _indices(wanted.of(group)))
    passes = list(requests[0].passes)
    pipeline.encode(requests, guided=requests[0].guided, steps=passes[0]).at(1)  # `sample` finds it in the cache
    detail = f"{len(group)} images" if len(group) > 1 else ""
    yield Phase("denoise", _indices(wanted.of(group)), detail, passes.pop(0))
    step: Step | None = None
    notes: list[str] = []
    decode = partial(_decoded_anyhow, pipeline)
    with contextlib.ExitStack() as stack:
        recordings = [stack.enter_context(one.record(pipeline, requests, decode)) for one in observers]
        for step in sample(pipeline, requests, report=notes.append):
            for recording in recordings:
                recording.add(step)
            yield from wanted.without_cancelled(group)
            left = wanted.of(group)
            if not left:
                return _Denoised(None)
            preview = partial(preview_or_none, pipeline, requests, step, lease.safety_checker)
            rows = [row for row, job in enumerate(group) if job in wanted]
            previews = partial(previews_or_none, pipeline, requests, step, lease.safety_checker, rows=rows)
            yield Progress(_indices(left), step.index, step.count, preview, previews)
            if passes and step.index + 1 == step.count:
                yield Phase("denoise", _indices(left), detail, passes.pop(0))
    assert step is not None
    return _Denoised(step.latents, recordings, tuple(dict.fromkeys(notes)))


def _decode(
    lease: Lease,
    group: list[ResolvedJob],
    wanted: _Wanted,
    denoised: _Denoised,
    fallbacks: tuple[str, ...],
    share: float,
) -> Iterator[BatchEvent]:
    """Decode the wanted images of a denoised group; `share` are the seconds that denoising took for each."""
    assert denoised.latents is not None
    left = _indices(wanted.of(group))
    yield from (Note(text, left) for text in denoised.notes)
    yield Phase("decode", left)
    for position, job in enumerate(group):
        yield from wanted.without_cancelled([job])
        if job not in wanted:
            continue
        began = time.monotonic()
        try:
            pixels, notes = decode_with_fallbacks(lease.pipeline.space, denoised.latents[position])
            pixels = _finished(lease.pipeline, job.request, pixels)
            flagged = lease.safety_checker is not None and lease.safety_checker.flags(from_pixels(pixels))
        except OF_ONE_IMAGE as error:
            yield from wanted.failed([job], error)
            continue
        yield from (Note(text, (job.index,)) for text in notes)
        if flagged:
            yield Failed(job, _flagged_by(lease.pipeline), flagged=True)
            continue
        yield Generated(
            job,
            pixels,
            batch_size=len(group),
            batch_index=position,
            seconds=share + time.monotonic() - began,
            fallbacks=(*fallbacks, *denoised.notes, *notes),
            side_files=_side_files(denoised.recordings, position, pixels),
        )


def _side_files(recordings: Sequence[Recording], position: int, pixels: Tensor) -> Iterator[SideFile]:
    for recording in recordings:
        yield from recording.files(position, pixels)


def _finished(pipeline: Pipeline, request: ResolvedRequest, pixels: Tensor) -> Tensor:
    """Decoded pixels [3, H, W] with the kept part of a masked init image laid over them, and with the watermark.

    Raises BadOutput for a watermark that the image cannot carry.
    """
    if request.masked:
        pixels = pipeline.inputs.init_image(request).pasted(pixels)
    if request.watermark is not None:
        pixels = to_pixels(with_watermark(from_pixels(pixels), request.watermark))
    return pixels


def _decoded_anyhow(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """The pixels of latents that need not be an image yet."""
    return decode_with_fallbacks(pipeline.space, latents, may_be_black=True)[0]


def _flagged_by(pipeline: Pipeline) -> BadOutput:
    name = pipeline.model.spec.name
    return BadOutput(f"the safety checker of {name} flagged the image, so it was not saved (--safety off saves it)")


def _indices(jobs: Sequence[ResolvedJob]) -> tuple[int, ...]:
    return tuple(job.index for job in jobs)
