"""The progress of a batch as events of its jobs: speed, time left, and latent previews at the rates they chose."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sdcli.server.protocol import Happened, Part, Partial, PreviewImage, Report

if TYPE_CHECKING:
    from sdcli.generation.events import Progress
    from sdcli.generation.resolve.jobs import ResolvedJob

Share = tuple[Part, list[int], list[int]]
"""A job, those of its images that something is about, and their places among all images that it is about."""


class Steps:
    """Turns the steps of one order into reports. `owners` has the job of each image, and its number there."""

    def __init__(self, owners: Sequence[tuple[Part, int]]) -> None:
        self._owners = owners
        self._began = time.monotonic()
        self._shown: dict[str, float] = {}
        """Job -> when its last preview was computed."""
        self._before, self._total = 0, 0

    def begin_batch(self, jobs: Sequence[ResolvedJob]) -> None:
        """The images of a batch come next; they have the same number of steps."""
        self._before, self._total = 0, sum(jobs[0].request.passes)
        self._shown = dict.fromkeys({self._owners[job.index][0].id for job in jobs}, time.monotonic())

    def begin_phase(self) -> None:
        """The speed of the next steps is measured from now on."""
        self._began = time.monotonic()

    def of(self, progress: Progress) -> Iterator[Report]:
        """The events of a step that is done."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        done = progress.index + 1
        rate = done / seconds
        total = max(self._total, self._before + progress.count)  # the steps of a group that was halved start again
        over = self._before + done
        step = {
            "type": "step",
            "step": done,
            "steps": progress.count,
            "fraction": round(over / total, 4),
            "per_second": round(rate, 3),
            "seconds_left": round((total - over) / rate, 1),
        }
        parts = shares(self._owners, progress.jobs)
        yield from (Happened(part.id, {**step, "images": own}) for part, own, _ in parts)
        if over < total:
            yield from self._partials(progress, parts, over, total)
            yield from self._previews(progress, parts, over)
        if done == progress.count:
            self._before = 0 if over >= total else over

    def _partials(self, progress: Progress, shares: list[Share], over: int, total: int) -> Iterator[Partial]:
        from sdcli.metadata.embed import image_bytes

        wanted = [share for share in shares if over in partial_steps(total, share[0].partial_images)]
        images = progress.previews(exact=True) if wanted else []
        for part, own, positions in wanted if images else []:
            for image, position in zip(own, positions, strict=True):
                data = image_bytes(images[position], part.format, None, quality=part.quality)
                yield Partial(part.id, image, over, data)

    def _previews(self, progress: Progress, shares: list[Share], over: int) -> Iterator[PreviewImage]:
        now = time.monotonic()
        wanted = [
            share for share in shares if share[0].preview_every is not None and now >= self._next_preview(share[0])
        ]
        from sdcli.metadata.embed import image_bytes

        images = progress.previews() if wanted else []
        for part, own, positions in wanted:
            self._shown[part.id] = time.monotonic()
            for image, position in zip(own, positions, strict=True) if images else ():
                yield PreviewImage(part.id, image, over, image_bytes(images[position], "png", None))

    def _next_preview(self, part: Part) -> float:
        """When a job wants its next latent preview."""
        return self._shown[part.id] + (part.preview_every or 0.0)


def shares(owners: Sequence[tuple[Part, int]], images: Iterable[int]) -> list[Share]:
    """The jobs that some images of an order belong to. `owners` has the job of each image, and its number there."""
    found: dict[str, Share] = {}
    for position, number in enumerate(images):
        part, image = owners[number]
        _, own, positions = found.setdefault(part.id, (part, [], []))
        own.append(image)
        positions.append(position)
    return list(found.values())


def partial_steps(steps: int, count: int) -> frozenset[int]:
    """After which of the steps, from 1, partial images are decoded: spread evenly, and never after the last one."""
    return frozenset(round(steps * (number + 1) / (count + 1)) for number in range(count)) - {0, steps}
