"""The jobs of the server: their states, their events, and their images until they expire."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from sdcli.generation.plan import batch_key
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.images.formats import ImageFormat
from sdcli.request.fields import ImageBytes
from sdcli.server.protocol import ImageDone, ImageFailed, Partial, PreviewImage

State = Literal["queued", "running", "done", "partial", "failed", "cancelled"]
"""`partial`: some images are done, others failed."""
ENDED = ("done", "partial", "failed", "cancelled")
PASSING = ("queued", "step", "preview")
"""Events that say nothing any more once the job is over."""


@dataclass(eq=False)
class Job:
    """One submission: some images, generated together by one worker."""

    id: str
    client: str
    images: tuple[ResolvedJob, ...]
    """Their indices count from 0, and all stay in it. Of a job that is over, the uploaded images are dropped."""
    format: ImageFormat = "png"
    preview_every: float | None = None
    """Seconds between latent previews."""
    partial_images: int = 0
    """How many whole images of the x0 prediction the worker decodes along the way."""
    quality: int | None = None
    """Of JPEG and WebP; None is the usual one."""
    tied: bool = False
    """Whether the job is cancelled when the last client that follows its events goes away."""
    timeout: float | None = None
    """How long it may run, in seconds."""
    state: State = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    events: list[dict[str, Any] | None] = field(default_factory=list)
    """By their numbers; None for one that was dropped at the end."""
    previews: dict[int, PreviewImage] = field(default_factory=dict)
    """The newest one of each image."""
    preview: PreviewImage | None = None
    """The newest one of all."""
    partials: list[Partial] = field(default_factory=list)
    done: dict[int, ImageDone] = field(default_factory=dict)
    failed: dict[int, ImageFailed] = field(default_factory=dict)
    progress: float = 0.0
    """How much of it is done, 0..1."""
    seconds_left: float | None = None
    late: bool = False
    """Whether it was cancelled because its time was over."""
    followers: int = 0
    """Clients that follow its events now."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def error(self) -> ImageFailed | None:
        """Why the first image failed that did."""
        return next(iter(self.failed.values()), None)

    @property
    def model(self) -> str:
        """The model of its first image."""
        return self.images[0].request.model

    @property
    def left(self) -> list[int]:
        """The images that are neither done nor failed."""
        return [one.index for one in self.images if one.index not in self.done and one.index not in self.failed]

    @cached_property
    def batch_key(self) -> tuple[Any, ...] | None:
        """Equal for jobs that can be denoised in one batch; None for one whose own images cannot."""
        first, *others = map(batch_key, self.images)
        return first if all(key == first for key in others) else None

    def add(self, event: dict[str, Any]) -> None:
        """Append an event, and wake up everyone who follows them."""
        self.events.append(event)
        self.touch()

    def touch(self) -> None:
        """Wake up everyone who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self) -> None:
        """Wait until the job is over."""
        while not self.over:
            await self._changed.wait()

    async def follow(self, first: int = 0) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """The events from number `first` on, with their numbers, until the job is over.

        A slow reader costs no one else anything: it gets what is in the list when it comes back. Some time after the
        end those of `PASSING` are no longer in it.
        """
        number = first
        while True:
            changed = self._changed
            while number < len(self.events):
                event = self.events[number]
                if event is not None:
                    yield number, event
                number += 1
            if self.over:
                return
            await changed.wait()

    def start(self) -> None:
        self.state, self.started = "running", time.time()

    def finish(self) -> None:
        """Set the final state, which follows from those of the images, and drop what nobody needs any more."""
        kinds = {one.kind for one in self.failed.values()}
        if not self.failed:
            self.state = "done"
        elif self.done:
            self.state = "partial"
        else:
            self.state = "cancelled" if kinds == {"cancelled"} else "failed"
        self.ended, self.progress, self.seconds_left = time.time(), 1.0, 0.0
        self.images = tuple(_without_uploads(one) for one in self.images)
        self.previews, self.preview = {}, None
        self.add({"type": "end", "state": self.state})

    def forget_steps(self) -> None:
        """Drop the events that say nothing any more."""
        self.events = [None if event is None or event["type"] in PASSING else event for event in self.events]

    @property
    def bytes_kept(self) -> int:
        """Bytes of its images."""
        return sum(len(one.data) for one in self.done.values()) + sum(len(one.data) for one in self.partials)


class JobStore:
    """All jobs by their ids. Finished ones are dropped `keep` seconds after their end, or sooner where they are many.

    The oldest go first when the images of the finished jobs have more than `max_bytes` bytes.
    """

    def __init__(self, keep: float, max_bytes: int) -> None:
        self.keep, self.max_bytes = keep, max_bytes
        self.kept_bytes = 0
        self._jobs: dict[str, Job] = {}
        self._finished: OrderedDict[str, Job] = OrderedDict()
        """In the order of their ends."""
        self._fresh: deque[Job] = deque()
        """Those that still have all their events."""
        self._expired: dict[str, None] = {}

    def add(self, job: Job) -> None:
        self.expire()
        self._jobs[job.id] = job

    def finished(self, job: Job) -> None:
        """A job has ended: its time begins."""
        self._finished[job.id] = job
        self._fresh.append(job)
        self.kept_bytes += job.bytes_kept
        self.expire()

    def find(self, id: str) -> Job | None:
        self.expire()
        return self._jobs.get(id)

    def was_there(self, id: str) -> bool:
        """Whether there was a job of this id, whose images have been dropped."""
        return id in self._expired

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def expire(self, now: float | None = None) -> None:
        """Drop the jobs whose time is over; their ids are remembered for a while."""
        now = time.time() if now is None else now
        while self._fresh and (self._fresh[0].ended or now) + STEPS_KEPT <= now:
            self._fresh.popleft().forget_steps()
        while self._finished:
            job = next(iter(self._finished.values()))
            many = len(self._finished) > MOST_KEPT or (self.kept_bytes > self.max_bytes and len(self._finished) > 1)
            if job.ended is not None and job.ended + self.keep > now and not many:
                break
            del self._finished[job.id], self._jobs[job.id]
            self.kept_bytes -= job.bytes_kept
            self._expired[job.id] = None
        while len(self._expired) > REMEMBERED:
            del self._expired[next(iter(self._expired))]


STEPS_KEPT = 30.0
"""Seconds after the end of a job in which its followers can still read every step."""
MOST_KEPT = 4096
"""Finished jobs that are kept, however small their images are."""
REMEMBERED = 10_000
"""Ids of expired jobs that answer 410 instead of 404."""


def _without_uploads(job: ResolvedJob) -> ResolvedJob:
    """The same job, of whose uploaded images only the digests are left."""
    request = job.request
    changed: dict[str, Any] = {
        name: ImageBytes(sha256=value.sha256)
        for name in ("init_image", "mask")
        if isinstance(value := getattr(request, name), ImageBytes)
    }
    if any(isinstance(control.image, ImageBytes) for control in request.controls):
        changed["controls"] = tuple(
            control.model_copy(update={"image": ImageBytes(sha256=control.image.sha256)})
            if isinstance(control.image, ImageBytes)
            else control
            for control in request.controls
        )
    return replace(job, request=request.model_copy(update=changed)) if changed else job
