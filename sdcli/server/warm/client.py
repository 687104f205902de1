"""The command's end: the events of `service.generate` from a warm worker, with the command's own writer and files.

Where the worker fails, `generate` goes on in this process: what is written stays, and the rest gets the same bytes as
without any worker. Imports no torch until then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.errors import SdcliError, Stop, packed_error, stop_if_asked, unpacked_error
from sdcli.generation.events import Event, Note, Phase, Progress, Result, SideFile
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import RunSettings
from sdcli.generation.writer import Writer
from sdcli.request.input_files import stdin_bytes
from sdcli.server.warm.identity import difference, identity
from sdcli.server.warm.messages import Gone, Message, Wire
from sdcli.server.warm.place import ANSWER, Place, Unsafe

if TYPE_CHECKING:
    from PIL import Image

RETIRE = 60.0
"""Seconds that a worker has to read that it shall end; it may be importing torch."""
ASK_AGAIN = 0.1
"""Seconds between two looks for a signal while the worker works."""


class NoWorker(Exception):
    """A worker was expected, and this is why it is not used."""

    def __init__(self, reason: str, *, replaceable: bool = False, outdated: bool = False) -> None:
        super().__init__(reason)
        self.replaceable, self.outdated = replaceable, outdated
        """Whether another one can be started now, and whether instead of one that is ending."""


@dataclass
class Worker:
    """A connection to a worker that fits."""

    wire: Wire
    pid: int
    patience: float
    """Seconds that a command may wait for its turn: about what it would take to begin without a worker."""
    place: int = 0
    """In the queue; 0 where it is its turn."""


@dataclass
class _Known:
    """What is known of the jobs when a worker fails."""

    over: set[int] = field(default_factory=set)
    """Jobs that have a Result."""
    written: dict[int, Path] = field(default_factory=dict)
    """The images of those that have none yet."""


def connect(place: Place, *, retire: bool = False, seconds: float = ANSWER) -> Worker:
    """A connection to the worker at a place, if it answers within some seconds. Raises NoWorker.

    With `retire` a worker of --keep-warm that does not fit any more, as after an update, is told to end.
    """
    try:
        connection = place.connect()
    except Unsafe as error:
        raise NoWorker(str(error)) from None
    except ConnectionRefusedError:
        place.remove_stale()
        raise NoWorker("it has died", replaceable=True) from None
    except OSError as error:
        raise NoWorker(error.strerror or str(error)) from None
    wire = Wire(connection)
    try:
        greeting = wire.receive_within(seconds)
        if greeting is None:
            raise NoWorker("it does not answer")
        _, facts = greeting
        left, other = facts["seconds_left"], difference(identity(), facts["identity"])
        if other is not None:
            ending = retire and facts["retires"] and left == 0
            if ending:
                wire.send("retire")
                with contextlib.suppress(Gone):
                    wire.receive_within(RETIRE)  # "start"; until then it has not read the message
            raise NoWorker(f"it has another {other}", replaceable=ending, outdated=ending)
        if left is None or left > facts["patience"]:
            raise NoWorker("it is busy")
        return Worker(wire, facts["pid"], facts["patience"], facts["place"])
    except Gone:
        wire.close()
        raise NoWorker("it has ended", replaceable=True) from None
    except NoWorker:
        wire.close()
        raise


def generate(
    jobs: Sequence[ResolvedJob],
    run: RunSettings,
    writer: Writer,
    worker: Worker,
    *,
    stop: Stop,
    note: Callable[[str], None],
    previews: bool = False,
    keep: float | None = None,
) -> Iterator[Event]:
    """The events of `service.generate`, by a worker, and in this process for what is left where the worker fails.

    `note` gets a sentence where the worker fails; `previews` says that some steps will be shown. A worker of
    --keep-warm stays for `keep` seconds after the last job.
    """
    known = _Known()
    remote = _RemoteRun(worker, jobs, writer, stop, known, previews=previews)
    try:
        yield from remote.events(run, keep)
        return
    except Gone:
        note(without("it has died"))
    except NoWorker as reason:
        note(without(str(reason)))
    finally:
        worker.wire.close()
    yield from _completed(jobs, writer, known)
    from sdcli.generation import service
    from sdcli.generation.model_cache import ModelCache

    yield from service.generate(jobs, ModelCache(run), writer, stop=stop, over=known.over, written=known.written)


def without(reason: str) -> str:
    """The one line about a worker that is not used."""
    return f"generating without the warm worker: {reason}"


def _completed(jobs: Sequence[ResolvedJob], writer: Writer, known: _Known) -> Iterator[Result]:
    """The results of images whose files were all written when the worker died, just before it could say so."""
    for job in jobs:
        path = known.written.get(job.index)
        if path is not None and job.index not in known.over and all(file.exists() for file in writer.side_files(path)):
            known.over.add(job.index)
            yield Result("done", job, path, side_files=writer.side_files(path))


class _RemoteRun:
    """One order to a worker: its messages become events, and what it wants written is written."""

    def __init__(
        self,
        worker: Worker,
        jobs: Sequence[ResolvedJob],
        writer: Writer,
        stop: Stop,
        known: _Known,
        *,
        previews: bool,
    ) -> None:
        self._worker, self._wire, self._jobs, self._writer = worker, worker.wire, jobs, writer
        self._by_index: Mapping[int, ResolvedJob] = {job.index: job for job in jobs}
        self._stop, self._stopping, self._known, self._previews = stop, False, known, previews

    def events(self, run: RunSettings, keep: float | None) -> Iterator[Event]:
        """Raises Gone and NoWorker where the worker fails, and what `service.generate` raises."""
        stop_if_asked(self._stop)
        yield from self._wait_for_turn()
        self._order(run, keep)
        while True:
            match self._receive():
                case ("phase", name, jobs, detail, steps):
                    yield Phase(name, jobs, detail, steps)
                case ("progress", jobs, index, count):
                    yield Progress(jobs, index, count, preview=self._preview)
                    if self._previews:
                        self._wire.send("go")
                case ("note", text, jobs):
                    yield Note(text, jobs)
                case ("result", *facts):
                    result = self._result(*facts)
                    self._known.over.add(result.job.index)
                    yield result
                case ("begin", indices):
                    self._do(lambda: self._writer.begin([self._by_index[index] for index in indices]))
                case ("write", index, data):
                    self._do(lambda: self._write(index, data))
                case ("side files", image, replace):
                    self._do(lambda: self._write_side_files(image, replace))
                case ("end",):
                    stop_if_asked(self._stop)
                    return
                case ("stopped",):
                    stop_if_asked(self._stop)
                    raise Gone
                case ("raised", error):
                    raise unpacked_error(error)
                case ("broken", reason):
                    raise NoWorker(reason)
                case _:
                    raise Gone

    def _order(self, run: RunSettings, keep: float | None) -> None:
        folder = os.stat(".")
        order = {
            "folder": os.getcwd(),
            "folder_id": (folder.st_dev, folder.st_ino),
            "run": run,
            "output": self._writer.output,
            "jobs": tuple(self._jobs),
            "finished": self._writer.finished(self._jobs),
            "journal": self._writer.has_journal,
            "previews": self._previews,
            "stdin": stdin_bytes() if stdin_bytes.cache_info().currsize else None,
            "keep": keep,
        }
        self._wire.send("run", order)

    def _wait_for_turn(self) -> Iterator[Phase]:
        """A phase for each place in the queue. Raises NoWorker where the worker takes too long to begin, and Gone."""
        deadline, place = time.monotonic() + self._worker.patience, self._worker.place
        while True:
            if place:
                yield Phase("wait", tuple(self._by_index), f"place {place} in the queue")
            while not self._wire.wait(ASK_AGAIN):
                stop_if_asked(self._stop)
                if time.monotonic() > deadline:
                    raise NoWorker("it is busy")
            match self._wire.receive():
                case ("start",):
                    return
                case ("place", int() as place):
                    pass
                case _:
                    raise Gone

    def _receive(self) -> Message:
        """The next message. The worker is told when a signal has asked for a stop."""

        def look() -> None:
            if not self._stopping and self._stop() is not None:
                self._stopping = True
                self._wire.send("stop")

        return self._wire.receive_while(ASK_AGAIN, look)

    def _do(self, act: Callable[[], Any]) -> None:
        """Answer with what `act` returns, or with its error, which the worker handles as it would its own."""
        try:
            answer = act()
        except SdcliError as error:
            self._wire.send("error", packed_error(error))
        else:
            self._wire.send("done", answer)

    def _write(self, index: int, data: bytes) -> str:
        path = self._writer.write(self._by_index[index], data)
        self._known.written[index] = path
        return str(path)

    def _write_side_files(self, image: str, replace: bool) -> list[str]:
        def files() -> Iterator[SideFile]:
            while True:
                self._wire.send("next")
                match self._receive():
                    case ("file", None):
                        return
                    case ("file", (suffix, data)):
                        yield suffix, data
                    case ("failed file", error):
                        raise unpacked_error(error)
                    case _:
                        raise Gone

        return [str(path) for path in self._writer.write_side_files(Path(image), files(), replace=replace)]

    def _preview(self) -> Image.Image | None:
        self._wire.send("preview")
        match self._receive():
            case ("image", None):
                return None
            case ("image", (mode, size, data, decoded)):
                from PIL import Image

                image = Image.frombytes(mode, size, data)
                image.info["decoded"] = decoded
                return image
        raise Gone

    def _result(
        self,
        status: Any,
        index: int,
        path: str | None,
        seconds: float,
        fallbacks: tuple[str, ...],
        error: Any,
        side_files: tuple[str, ...],
    ) -> Result:
        return Result(
            status,
            self._by_index[index],
            None if path is None else Path(path),
            seconds,
            fallbacks,
            None if error is None else unpacked_error(error),
            tuple(map(Path, side_files)),
        )
