"""Images on a worker: one batch through the generation service, written into the shared folder under reserved names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from sdcli.cluster.generate_driver import BatchOrder, GenerateSetup
from sdcli.cluster.units import Attempt, FromWork, ItemRow, Work, Working, WorkRemark
from sdcli.errors import Interrupted, OutOfMemory, UsageError, packed_error
from sdcli.generation.events import Note, Phase, Progress, Result
from sdcli.generation.journal import Journal, entry_of
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.service import generate
from sdcli.generation.settings import OutputSettings
from sdcli.generation.writer import Writer
from sdcli.io.files import AlreadyExists, numbered, write_whole


def start(setup: GenerateSetup) -> Work:
    """The function that generates batches. Raises UsageError where this node has another kind of device."""
    return _BatchWork(setup).do


class _Stopped(Interrupted):
    """The driver wants no more images."""


class _BatchWork:
    def __init__(self, setup: GenerateSetup) -> None:
        self._setup, self._cache = setup, ModelCache(setup.run)
        if self._cache.limits.on_gpu != setup.on_gpu:
            kind = "a GPU" if setup.on_gpu else "no GPU"
            raise UsageError(f"torch finds {'no GPU' if setup.on_gpu else 'a GPU'} here, the batches are for {kind}")
        self._journal = Journal(setup.output.outdir, part=f"{setup.part}-{secrets.token_hex(4)}")
        self._journal.begin_run(*setup.begun)

    def do(self, attempt: Attempt, cancelled: Callable[[], bool]) -> Iterator[FromWork]:
        order: BatchOrder = attempt.payload
        left = {index for index in attempt.items if index not in attempt.done}
        if attempt.number > 1:
            for row in self._written_before(order, left):
                left.discard(row.item)
                yield row
        writer = ReservedWriter(self._setup.output, self._journal, order.names)
        too_large: OutOfMemory | None = None
        progress = _Share(len(left))
        events = generate(
            order.jobs,
            self._cache,
            writer,
            stop=lambda: _Stopped() if cancelled() else None,
            cancelled=lambda job: cancelled(),
            over={job.index for job in order.jobs if job.index not in left},
        )
        try:
            for event in events:
                match event:
                    case Phase(name="load"):
                        yield Working(0.0, f"loading {event.detail}")
                    case Progress():
                        yield Working(progress.of(event))
                    case Note():
                        yield WorkRemark(event.text, event.jobs)
                    case Result(status="cancelled"):
                        pass
                    case Result(error=OutOfMemory() as error):  # another worker may have more
                        too_large = error
                    case Result():
                        progress.rows += 1
                        yield _row(event, writer)
        except _Stopped:
            return
        if too_large is not None:
            raise too_large

    def _written_before(self, order: BatchOrder, left: set[int]) -> Iterator[ItemRow]:
        """Rows of images that an earlier attempt wrote, just before it could say so."""
        journal = Journal(self._setup.output.outdir)
        for job in order.jobs:
            name = order.names.get(job.index)
            if job.index in left and name is not None and (entry := journal.entry(job.request.key(), name)) is not None:
                yield ItemRow(
                    job.index, {"status": "done", "path": name, "seconds": 0.0, "fallbacks": [], "entry": entry}
                )


class ReservedWriter(Writer):
    """A writer of images whose names the driver has chosen. `entries` are those of the journal, by index.

    A file that has the name already and is this image, written by an earlier attempt or by one that runs elsewhere at
    the same time, is as good as written.
    """

    def __init__(self, output: OutputSettings, journal: Journal, names: Mapping[int, str]) -> None:
        super().__init__(replace(output, resume=False), journal)
        self._own, self._reserved = journal, names
        self.entries: dict[int, dict[str, Any]] = {}

    def write(self, job: ResolvedJob, data: bytes) -> Path:
        if job.index not in self._reserved:
            return super().write(job, data)  # which raises what is wrong with its name
        folder, key, number = self.output.outdir, job.request.key(), 1
        while True:
            name = str(numbered(PurePosixPath(self._reserved[job.index]), number))
            path = folder / name
            if not self.output.overwrite and os.path.lexists(path):
                entry = self._entry_of_own(key, name, path, data, self._keys[job.index])
                if entry is not None:
                    self.entries[job.index] = entry
                    return path
                number += 1
                continue
            try:
                self.entries[job.index] = entry_of(key, self._keys[job.index], name, data)
                self._own.add([self.entries[job.index]])
                write_whole(path, data, overwrite=self.output.overwrite)
            except AlreadyExists:
                continue
            return path

    def _entry_of_own(self, key: str, name: str, path: Path, data: bytes, job_key: str | None) -> dict[str, Any] | None:
        """The journal's entry of a file that has the name of an image, if it is that image."""
        try:
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                return entry_of(key, job_key, name, data)
        except OSError:
            return None
        return Journal(self.output.outdir).entry(key, name)


class _Share:
    """How much of a batch is done."""

    def __init__(self, images: int) -> None:
        self._images, self.rows = images, 0

    def of(self, event: Progress) -> float:
        steps = len(event.jobs) * (event.index + 1) / event.count
        return min(1.0, (self.rows + steps) / self._images)


def _row(result: Result, writer: ReservedWriter) -> ItemRow:
    if result.error is not None:
        return ItemRow(result.job.index, {"status": result.status, "error": packed_error(result.error)})
    entry = writer.entries[result.job.index]
    return ItemRow(
        result.job.index,
        {
            "status": result.status,
            "path": entry["path"],
            "seconds": result.seconds,
            "fallbacks": list(result.fallbacks),
            "entry": entry,
        },
    )
