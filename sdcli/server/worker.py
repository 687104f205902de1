"""The loop of a worker process: one device, one model cache, one order at a time.

The worker has no files of its own and no network. It ends when its pipe is closed, so it never outlives the server.
Signals of the terminal are the server's to handle.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import TYPE_CHECKING

from sdcli.errors import NotFound, OutOfMemory, SdcliError, UsageError
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import RunSettings
from sdcli.server.protocol import (
    Cancel,
    Ended,
    Generate,
    Happened,
    ImageDone,
    ImageFailed,
    Lend,
    Order,
    Part,
    Ready,
    Report,
    Unload,
    Unusable,
)
from sdcli.server.steps import Steps, shares

if TYPE_CHECKING:
    from sdcli.generation.events import BatchEvent, Generated
    from sdcli.generation.model_cache import Lease, ModelCache
    from sdcli.generation.plan import Batch


def work(connection: Connection, settings: RunSettings, preload: Sequence[ResolvedJob], threads: int | None) -> None:
    """Take orders until the pipe is closed. This is the target of the process.

    The models of `preload` are loaded first; `threads` are those of torch, None leaves them to it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    import torch

    from sdcli.generation.model_cache import ModelCache
    from sdcli.io.devices import pick_device

    if threads is not None:
        torch.set_num_threads(threads)
    worker = _Worker(connection, ModelCache(settings))
    threading.Thread(target=worker.listen, daemon=True).start()
    try:
        device = pick_device(settings.device)
        for job in preload:
            with worker.cache.lease(job):
                pass
    except SdcliError as error:
        worker.report(Unusable(str(error), error.exit_code))
        return
    worker.report(Ready(worker.cache.limits, device.type))
    worker.serve()


class _Worker:
    def __init__(self, connection: Connection, cache: ModelCache) -> None:
        self._connection, self.cache = connection, cache
        self._orders: queue.SimpleQueue[Order | tuple[Lend, int]] = queue.SimpleQueue()
        self._cancelled: set[tuple[str, int | None]] = set()
        self._cancelling = threading.Lock()
        self._sending = threading.Lock()

    def listen(self) -> None:
        """Receive orders, in a thread, so that a cancel is seen between steps."""
        while True:
            try:
                order = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server is gone, and with it everyone who waits for the image
            if order is None:
                os._exit(0)
            if isinstance(order, Lend):
                self._orders.put((order, recv_handle(self._connection)))
            elif isinstance(order, Cancel):
                images: list[int | None] = [None] if order.images is None else list(order.images)
                with self._cancelling:
                    self._cancelled |= {(order.id, image) for image in images}
            else:
                self._orders.put(order)

    def serve(self) -> None:
        while True:
            match self._orders.get():
                case Generate(parts):
                    _Run(self, parts).run()
                    ids = {part.id for part in parts}
                    with self._cancelling:
                        self._cancelled = {one for one in self._cancelled if one[0] not in ids}
                case (Lend(id), int() as descriptor):
                    self._generate_for_command(id, descriptor)
                case Unload():
                    self.cache.unload()

    def _generate_for_command(self, id: str, descriptor: int) -> None:
        from sdcli.server.warm.messages import Wire
        from sdcli.server.warm.session import Retire, SessionProgress, carry_out, take_order

        wire = Wire(socket.socket(fileno=descriptor), trusting=True)
        with contextlib.suppress(Retire):  # which this worker does not offer
            order = take_order(wire)
            if order is not None:
                carry_out(order, wire, self.cache, SessionProgress())
        wire.close()
        self.report(Ended(id))

    def report(self, report: Report) -> None:
        try:
            with self._sending:
                self._connection.send(report)
        except OSError:
            os._exit(0)

    def is_cancelled(self, id: str, image: int) -> bool:
        return (id, None) in self._cancelled or (id, image) in self._cancelled


class _Run:
    """One order. Inside, the images of all its jobs are numbered on; reports name them as their jobs do."""

    def __init__(self, worker: _Worker, parts: Sequence[Part]) -> None:
        self._worker, self._cache = worker, worker.cache
        self._owners = [(part, image.index) for part in parts for image in part.images]
        images = [image for part in parts for image in part.images]
        self._images = [replace(image, index=number) for number, image in enumerate(images)]
        self._left = {part.id: {image.index for image in part.images} for part in parts}
        self._steps = Steps(self._owners)

    def run(self) -> None:
        try:
            for report in self._reports():
                self._send(report)
        except Exception as error:
            if not isinstance(error, SdcliError):
                traceback.print_exc(file=sys.stderr)
            for id, images in list(self._left.items()):
                for image in sorted(images):
                    self._send(_failure(id, image, error))

    def _send(self, report: Report) -> None:
        """Send a report; after that of a job's last image, that the job has ended."""
        self._worker.report(report)
        if isinstance(report, ImageDone | ImageFailed):
            self._left[report.id].discard(report.image)
            if not self._left[report.id]:
                self._worker.report(Ended(report.id))

    def _reports(self) -> Iterator[Report]:
        from sdcli.generation.plan import plan

        for batch in plan(self._images, self._cache.limits):
            first = batch.jobs[0]
            if all(self._is_cancelled(job) for job in batch.jobs):
                yield from (self._cancelled(job) for job in batch.jobs)
                continue
            if not self._cache.has_models(first):
                yield from self._happened([job.index for job in batch.jobs], type="phase", phase="load")
            try:
                with self._cache.lease(first) as lease:
                    yield from self._batch(lease, batch)
            except (SdcliError, MemoryError) as error:
                for job in batch.jobs:
                    part, image = self._owners[job.index]
                    if image in self._left[part.id]:
                        yield _failure(part.id, image, error)

    def _batch(self, lease: Lease, batch: Batch) -> Iterator[Report]:
        from sdcli.generation.run_batch import run_batch

        self._steps.begin_batch(batch.jobs)
        strict = self._cache.run.strict_prompt
        for event in run_batch(lease, batch, cancelled=self._is_cancelled, strict_prompt=strict):
            yield from self._of_event(lease, event)

    def _of_event(self, lease: Lease, event: BatchEvent) -> Iterator[Report]:
        from sdcli.generation.events import Cancelled, Failed, Generated, Note, Phase, Progress

        match event:
            case Phase():
                self._steps.begin_phase()
                steps = {"steps": event.steps} if event.steps else {}
                yield from self._happened(event.jobs, type="phase", phase=event.name, **steps)
            case Progress():
                yield from self._steps.of(event)
            case Note():
                yield from self._happened(event.jobs, type="note", text=event.text)
            case Generated():
                yield self._image(lease, event)
            case Failed():
                part, image = self._owners[event.job.index]
                failure = _failure(part.id, image, event.error)
                yield replace(failure, kind="flagged") if event.flagged else failure
            case Cancelled():
                yield self._cancelled(event.job)

    def _happened(self, images: Iterable[int], **event: object) -> Iterator[Happened]:
        """An event of some images, for each of their jobs."""
        for part, own, _ in shares(self._owners, images):
            yield Happened(part.id, {**event, "images": own})

    def _is_cancelled(self, job: ResolvedJob) -> bool:
        part, image = self._owners[job.index]
        return self._worker.is_cancelled(part.id, image)

    def _cancelled(self, job: ResolvedJob) -> ImageFailed:
        part, image = self._owners[job.index]
        return ImageFailed(part.id, image, "cancelled", "cancelled")

    def _image(self, lease: Lease, generated: Generated) -> ImageDone:
        from sdcli.generation.image_file import image_file
        from sdcli.generation.settings import OutputSettings
        from sdcli.metadata.embed import parameters_text

        part, number = self._owners[generated.job.index]
        data, record = image_file(lease.pipeline, generated, OutputSettings(format=part.format), quality=part.quality)
        assert record is not None
        fields, text = record.request.typed(), parameters_text(record)
        return ImageDone(part.id, number, data, fields, text, round(generated.seconds, 3))


def _failure(id: str, image: int, error: BaseException) -> ImageFailed:
    match error:
        case OutOfMemory() | MemoryError():
            return ImageFailed(id, image, "out_of_memory", str(error) or "out of memory")
        case NotFound():
            return ImageFailed(id, image, "not_found", str(error))
        case UsageError():
            return ImageFailed(id, image, "bad_request", str(error))
        case SdcliError():
            return ImageFailed(id, image, "error", str(error))
    return ImageFailed(id, image, "error", f"unexpected {type(error).__name__}; the server's log has it")
