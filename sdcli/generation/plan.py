"""Jobs -> batches that can be denoised together. Pure: imports no torch, and reads nothing of the machine.

The limits of the device are passed in, so that whoever plans, here or on another machine, gets the same batches and
with them the same bytes.
"""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.models.families.family import ModelKind
from sdcli.request.input_files import is_latents
from sdcli.request.schema import ResolvedRequest

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

    def without(self, finished: Container[int]) -> Batch:
        """The same batch, of which the images of these jobs are not wanted."""
        return Batch(self.jobs, frozenset(index for index in self.wanted if index not in finished))

    @property
    def wanted_jobs(self) -> tuple[ResolvedJob, ...]:
        return tuple(job for job in self.jobs if job.index in self.wanted)


def plan(jobs: Iterable[ResolvedJob], limits: Limits) -> list[Batch]:
    """Batches of jobs whose requests differ in the fields of `PER_IMAGE` alone.

    The same jobs and limits always give the same batches. Models come in the order of their first job, and so do, for
    each model, the LoRAs, ControlNets and IP-Adapters that go with it.
    """
    known = list(jobs)
    return [Batch.of([known[place] for place in places]) for places in BatchPlaces(known, limits)]


class BatchPlaces:
    """The batches of `plan` as the places of their jobs, of which one after another is looked at."""

    def __init__(self, jobs: Iterable[ResolvedJob], limits: Limits) -> None:
        groups: dict[tuple[Any, ...], _Group] = {}
        models: dict[tuple[str | None, ...], int] = {}
        weights: dict[tuple[Any, ...], int] = {}
        for place, job in enumerate(jobs):
            key = batch_key(job)
            group = groups.get(key)
            if group is None:
                order = (
                    models.setdefault(models_of(job), len(models)),
                    weights.setdefault(_weights_of(job), len(weights)),
                )
                group = groups[key] = _Group(batch_size_of(job, limits), order)
            group.places.append(place)
        self._groups = sorted(groups.values(), key=lambda group: group.order)
        self.models = len(models)
        """How many models the jobs need, one after another."""

    def __iter__(self) -> Iterator[Sequence[int]]:
        for group in self._groups:
            for start in range(0, len(group.places), group.size):
                yield group.places[start : start + group.size]


@dataclass
class _Group:
    """Jobs that can be denoised in one batch of `size`."""

    size: int
    order: tuple[int, int]
    """The places of the model, and of it with everything else that is loaded."""
    places: array[int] = field(default_factory=lambda: array("I"))


def plan_digest(batches: Iterable[Batch]) -> str:
    """64 hex digits that are equal for equal batches of equal requests in the same order."""
    digest = hashlib.sha256()
    for batch in batches:
        for job in batch.jobs:
            digest.update(f"{job.index} {job.request.key()}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def batch_key(job: ResolvedJob) -> tuple[Any, ...]:
    """What two jobs have in common that can be denoised in one batch."""
    request = job.request
    shared = _shared_fields(vars(request))
    controls = tuple(one.model_copy(update={"image": None}) for one in request.controls)
    adapters = tuple(one.adapting for one in request.ip_adapters)
    return shared, request.masked, is_latents(request.init_image), controls, adapters


_shared_fields = operator.itemgetter(*(name for name in ResolvedRequest.model_fields if name not in PER_IMAGE))
"""Of a run of millions, each job is asked for these."""


def batch_size_of(job: ResolvedJob, limits: Limits) -> int:
    """The most images of a batch of such jobs."""
    width, height = job.request.final_size
    larger = max(1, job.model.kind.cell // ModelKind.cell) ** 2  # the denoiser has less to do for as many pixels
    return limits.batch_size or automatic_batch_size(width * height // larger, on_gpu=limits.on_gpu)


def automatic_batch_size(pixels: int, *, on_gpu: bool) -> int:
    """Images per batch: from size and device alone, not from what is free now, so that it is always the same.

    `pixels` of an image are those of Stable Diffusion, whose latent cells have 8 pixels a side.

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
