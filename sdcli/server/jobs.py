"""The jobs of the server: their states, their events, and their images until they expire."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.images.formats import ImageFormat
from sdcli.server.protocol import ImageDone, ImageFailed, Partial, Preview

State = Literal["queued", "running", "done", "partial", "failed", "cancelled"]
"""`partial`: some images are done, others failed."""
ENDED = ("done", "partial", "failed", "cancelled")


@dataclass(eq=False)
class Job:
    """One submission: some images, generated together by one worker."""

    id: str
    client: str
    images: tuple[ResolvedJob, ...]
    """Their indices count from 0."""
    format: ImageFormat = "png"
    preview_every: float | None = None
    partial_images: int = 0
    """How many whole images of the x0 prediction the worker decodes along the way."""
    quality: int | None = None
    """Of JPEG and WebP; None is the usual one."""
    tied: bool = False
    """Whether the job is cancelled when the client that follows its events goes away."""
    state: State = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    preview: Preview | None = None
    """The newest one."""
    partials: list[Partial] = field(default_factory=list)
    done: dict[int, ImageDone] = field(default_factory=dict)
    failed: dict[int, ImageFailed] = field(default_factory=dict)
    progress: float = 0.0
    """How much of it is done, 0..1."""
    seconds_left: float | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def error(self) -> ImageFailed | None:
        """Why the first image failed that did."""
        return next(iter(self.failed.values()), None)

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

        A slow reader costs no one else anything: it gets what is in the list when it comes back.
        """
        number = first
        while True:
            changed = self._changed
            while number < len(self.events):
                yield number, self.events[number]
                number += 1
            if self.over:
                return
            await changed.wait()

    def start(self) -> None:
        self.state, self.started = "running", time.time()

    def finish(self) -> None:
        """Set the final state, which follows from those of the images."""
        kinds = {one.kind for one in self.failed.values()}
        if not self.failed:
            self.state = "done"
        elif self.done:
            self.state = "partial"
        else:
            self.state = "cancelled" if kinds == {"cancelled"} else "failed"
        self.ended, self.progress, self.seconds_left = time.time(), 1.0, 0.0
        self.add({"type": "end", "state": self.state})


class JobStore:
    """All jobs by their ids; finished ones are dropped `keep` seconds after their end."""

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self._jobs: dict[str, Job] = {}
        self._expired: dict[str, None] = {}

    def add(self, job: Job) -> None:
        self.expire()
        self._jobs[job.id] = job

    def find(self, id: str) -> Job | None:
        self.expire()
        return self._jobs.get(id)

    def was_there(self, id: str) -> bool:
        """Whether there was a job of this id, whose images have been dropped."""
        return id in self._expired

    def __iter__(self) -> Any:
        return iter(self._jobs.values())

    def expire(self, now: float | None = None) -> None:
        """Drop the jobs whose time is over; their ids are remembered for a while."""
        now = time.time() if now is None else now
        for job in [job for job in self._jobs.values() if job.ended is not None and job.ended + self.keep <= now]:
            del self._jobs[job.id]
            self._expired[job.id] = None
        while len(self._expired) > REMEMBERED:
            del self._expired[next(iter(self._expired))]


REMEMBERED = 10_000
"""Ids of expired jobs that answer 410 instead of 404."""
