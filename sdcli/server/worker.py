"""The loop of a worker process: one device, one model cache, one job at a time.

The worker has no files, no network and no clock of its own. It ends when its pipe is closed, so it never outlives the
server. Signals of the terminal are the server's to handle.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sdcli.errors import NotFound, OutOfMemory, SdcliError, UsageError
from sdcli.generation.settings import RunSettings
from sdcli.server.protocol import (
    Cancel,
    Ended,
    Happened,
    ImageDone,
    ImageFailed,
    Order,
    Partial,
    Preload,
    Preview,
    Ready,
    Report,
    Run,
    Unload,
)

if TYPE_CHECKING:
    from sdcli.generation.events import BatchEvent, Generated, Progress
    from sdcli.generation.model_cache import Lease, ModelCache
    from sdcli.generation.plan import Batch
    from sdcli.generation.resolve.jobs import ResolvedJob


def work(connection: Connection, settings: RunSettings) -> None:
    """Take orders until the pipe is closed. This is the target of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from sdcli.generation.model_cache import ModelCache
    from sdcli.io.devices import keep_freed_memory

    keep_freed_memory()
    worker = _Worker(connection, ModelCache(settings))
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.report(Ready())
    worker.serve()


class _Worker:
    def __init__(self, connection: Connection, cache: ModelCache) -> None:
        self._connection, self._cache = connection, cache
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._cancelled: set[tuple[str, int | None]] = set()
        self._sending = threading.Lock()

    def listen(self) -> None:
        """Receive orders, in a thread, so that a cancel is seen between steps."""
        while True:
            try:
                order = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server is gone, and with it everyone who waits for the image
            if isinstance(order, Cancel):
                images: list[int | None] = [None] if order.images is None else list(order.images)
                self._cancelled |= {(order.id, image) for image in images}
            else:
                self._orders.put(order)

    def serve(self) -> None:
        while True:
            match self._orders.get():
                case Run() as run:
                    self._run(run)
                case Preload(job):
                    with contextlib.suppress(SdcliError), self._cache.lease(job):
                        pass  # the first request for it gets the error
                case Unload():
                    self._cache.unload()

    def report(self, report: Report) -> None:
        try:
            with self._sending:
                self._connection.send(report)
        except OSError:
            os._exit(0)

    def _run(self, run: Run) -> None:
        waiting = {job.index for job in run.images}
        try:
            for report in self._reports(run):
                if isinstance(report, ImageDone | ImageFailed):
                    waiting.discard(report.image)
                self.report(report)
        except Exception as error:
            if not isinstance(error, SdcliError):
                traceback.print_exc(file=sys.stderr)
            for image in sorted(waiting):
                self.report(_failed(run.id, image, error))
        self._cancelled = {one for one in self._cancelled if one[0] != run.id}
        self.report(Ended(run.id))

    def _reports(self, run: Run) -> Iterator[Report]:
        from sdcli.generation.plan import plan

        for batch in plan(run.images, self._cache.limits):
            first = batch.jobs[0]
            if all(self._is_cancelled(run.id, job) for job in batch.jobs):
                yield from (ImageFailed(run.id, job.index, "cancelled", "cancelled") for job in batch.jobs)
                continue
            if not self._cache.has_models(first):
                yield Happened(run.id, {"type": "phase", "phase": "load", "images": _images(batch)})
            try:
                with self._cache.lease(first) as lease:
                    yield from self._batch(run, lease, batch)
            except (SdcliError, MemoryError) as error:
                yield from (_failed(run.id, job.index, error) for job in batch.jobs)

    def _batch(self, run: Run, lease: Lease, batch: Batch) -> Iterator[Report]:
        from sdcli.generation.run_batch import run_batch

        steps = _Steps(run)
        for event in run_batch(
            lease,
            batch,
            cancelled=lambda job: self._is_cancelled(run.id, job),
            strict_prompt=self._cache.run.strict_prompt,
        ):
            yield from self._of_event(run, lease, event, steps)

    def _of_event(self, run: Run, lease: Lease, event: BatchEvent, steps: _Steps) -> Iterator[Report]:
        from sdcli.generation.events import Cancelled, Failed, Generated, Note, Phase, Progress

        match event:
            case Phase():
                phase: dict[str, Any] = {"type": "phase", "phase": event.name, "images": list(event.jobs)}
                steps.begin()
                yield Happened(run.id, {**phase, **({"steps": event.steps} if event.steps else {})})
            case Progress():
                yield from steps.of(event)
            case Note():
                yield Happened(run.id, {"type": "note", "text": event.text, "images": list(event.jobs)})
            case Generated():
                yield _image(run, lease, event)
            case Failed():
                failed = _failed(run.id, event.job.index, event.error)
                yield ImageFailed(failed.id, failed.image, "flagged", failed.sentence) if event.flagged else failed
            case Cancelled():
                yield ImageFailed(run.id, event.job.index, "cancelled", "cancelled")

    def _is_cancelled(self, id: str, job: ResolvedJob) -> bool:
        return (id, None) in self._cancelled or (id, job.index) in self._cancelled


class _Steps:
    """Turns progress into reports, with speed and time left, and previews at the rate that was asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began = self._preview = time.monotonic()

    def begin(self) -> None:
        self._began = time.monotonic()

    def of(self, progress: Progress) -> Iterator[Report]:
        now = time.monotonic()
        done, rate = progress.index + 1, (progress.index + 1) / max(now - self._began, 1e-9)
        yield Happened(
            self._run.id,
            {
                "type": "step",
                "images": list(progress.jobs),
                "step": done,
                "steps": progress.count,
                "per_second": round(rate, 3),
                "seconds_left": round((progress.count - done) / rate, 1),
            },
        )
        if done in partial_steps(progress.count, self._run.partial_images):
            yield from self._partial(progress, done)
        every = self._run.preview_every
        if every is None or done == progress.count or now - self._preview < every:
            return
        shown = progress.preview()
        self._preview = time.monotonic()
        if shown is not None:
            file = io.BytesIO()
            shown.convert("RGB").save(file, "PNG", compress_level=1)
            yield Preview(self._run.id, progress.jobs[0], done, file.getvalue())

    def _partial(self, progress: Progress, done: int) -> Iterator[Report]:
        from sdcli.metadata.embed import image_bytes

        shown = progress.preview(exact=True)
        if shown is not None:
            data = image_bytes(shown, self._run.format, None, quality=self._run.quality)
            yield Partial(self._run.id, progress.jobs[0], done, data)


def partial_steps(steps: int, count: int) -> frozenset[int]:
    """After which of the steps, from 1, partial images are decoded: spread evenly, and never after the last one."""
    return frozenset(round(steps * (number + 1) / (count + 1)) for number in range(count)) - {0, steps}


def _image(run: Run, lease: Lease, generated: Generated) -> ImageDone:
    from sdcli.generation.provenance import provenance
    from sdcli.images.image_files import pixels_digest
    from sdcli.images.pixels import from_pixels
    from sdcli.metadata.embed import image_bytes
    from sdcli.metadata.record import Record

    image, request = from_pixels(generated.pixels), generated.job.request
    batch = {"size": generated.batch_size, "index": generated.batch_index}
    facts = provenance(lease.pipeline, batch=batch, fallbacks=generated.fallbacks)
    record = Record(request, {**facts, "pixels": pixels_digest(image)})
    data = image_bytes(image, run.format, record, quality=run.quality)
    return ImageDone(run.id, generated.job.index, data, request.typed(), round(generated.seconds, 3))


def _failed(id: str, image: int, error: BaseException) -> ImageFailed:
    match error:
        case OutOfMemory() | MemoryError():
            return ImageFailed(id, image, "out_of_memory", str(error) or "out of memory")
        case UsageError() | NotFound():
            return ImageFailed(id, image, "bad_request", str(error))
        case SdcliError():
            return ImageFailed(id, image, "error", str(error))
    return ImageFailed(id, image, "error", f"unexpected {type(error).__name__}")


def _images(batch: Batch) -> list[int]:
    return [job.index for job in batch.jobs]
