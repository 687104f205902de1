"""Jobs -> batches that can be denoised together. Pure: imports no torch, and reads nothing of the machine.

The limits of the device are passed in, so that whoever plans, here or on another machine, gets the same batches and
with them the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.request.input_files import is_latents

PER_IMAGE = {
    *("prompt", "negative_prompt", "prompt_template", "seed", "variation_seed", "variation_strength"),
    *("init_image", "mask", "mask_blur", "invert_mask", "extend", "watermark"),
    *("controls", "ip_adapters"),
}
"""The fields in which the requests of one batch may differ; controls and IP-Adapters in their images alone."""


@dataclass(frozen=True)
class Limits:
    """What the size of a batch depends on."""

    batch_size: int | None = None
    """Images per batch; None chooses by the images' size and the kind of device."""
    on_gpu: bool = False


@dataclass(frozen=True)
class Batch:
    """Jobs that are denoised together, and the indices of those whose images are wanted.

    The others are computed along: an image has the same bytes whether or not its batch mates are wanted.
    """

    jobs: tuple[ResolvedJob, ...]
    wanted: frozenset[int]

    @classmethod
    def of(cls, jobs: Sequence[ResolvedJob]) -> Batch:
        """A batch of which every image is wanted."""
        return cls(tuple(jobs), frozenset(job.index for job in jobs))

    def without(self, finished: frozenset[int] | set[int]) -> Batch:
        """The same batch, of which the images of these jobs are not wanted."""
        return Batch(self.jobs, self.wanted - finished)

    @property
    def wanted_jobs(self) -> tuple[ResolvedJob, ...]:
        return tuple(job for job in self.jobs if job.index in self.wanted)


def plan(jobs: Sequence[ResolvedJob], limits: Limits) -> list[Batch]:
    """Batches of jobs whose requests differ in the fields of `PER_IMAGE` alone.

    The same jobs and limits always give the same batches. Models come in the order of their first job, and so do, for
    each model, the LoRAs, ControlNets and IP-Adapters that go with it.
    """
    groups: dict[tuple[Any, ...], list[ResolvedJob]] = {}
    for job in jobs:
        groups.setdefault(batch_key(job), []).append(job)
    models, weights = (_places(jobs, kind) for kind in (models_of, _weights_of))
    batches = []
    for group in sorted(groups.values(), key=lambda g: (models[models_of(g[0])], weights[_weights_of(g[0])])):
        size = batch_size_of(group[0], limits)
        batches += [Batch.of(group[start : start + size]) for start in range(0, len(group), size)]
    return batches


def batch_key(job: ResolvedJob) -> tuple[Any, ...]:
    """What two jobs have in common that can be denoised in one batch."""
    request = job.request
    shared = tuple(value for name, value in request if name not in PER_IMAGE)
    controls = tuple(one.model_copy(update={"image": None}) for one in request.controls)
    adapters = tuple(one.adapting for one in request.ip_adapters)
    return shared, request.masked, is_latents(request.init_image), controls, adapters


def batch_size_of(job: ResolvedJob, limits: Limits) -> int:
    """The most images of a batch of such jobs."""
    width, height = job.request.final_size
    return limits.batch_size or automatic_batch_size(width * height, on_gpu=limits.on_gpu)


def automatic_batch_size(pixels: int, *, on_gpu: bool) -> int:
    """Images per batch: from size and device alone, not from what is free now, so that it is always the same.

    A CPU is busy with one 512x512 image, and gains from batches only for small ones; a GPU needs several.
    """
    room = 16 * 512 * 512 if on_gpu else 8 * 128 * 128
    return max(1, min(16 if on_gpu else 8, room // pixels))


def models_of(job: ResolvedJob) -> tuple[str | None, ...]:
    """The model and the refiner, by their names: what takes longest to load."""
    return job.request.model, job.request.refiner


def _weights_of(job: ResolvedJob) -> tuple[Any, ...]:
    request = job.request
    adapters = tuple(one.adapting for one in request.ip_adapters)
    return models_of(job), request.loras, adapters, tuple(control.model for control in request.controls)


def _places(jobs: Sequence[ResolvedJob], kind: Any) -> dict[Any, int]:
    """Each different value of `kind` -> its place in the order of the jobs."""
    return {value: place for place, value in enumerate(dict.fromkeys(map(kind, jobs)))}
