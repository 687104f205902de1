"""The worker's end: one command's jobs through the generation service, with a writer that asks the command to write.

So the bytes, the order, the fallbacks and the failures are those of `sdcli generate` without a worker: it is the same
service. Every file is written by the command, with its rights and under its umask; the worker only reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sdcli.errors import Interrupted, SdcliError, packed_error, unpacked_error
from sdcli.generation.events import Event, Note, Phase, Progress, Result, SideFile
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.writer import Writer
from sdcli.request.input_files import stdin_bytes
from sdcli.server.warm.messages import Gone, Message, Wire
from sdcli.server.warm.place import as_option

if TYPE_CHECKING:
    from PIL import Image

    from sdcli.generation.model_cache import ModelCache

FIRST_MESSAGE = 10.0
"""Seconds that a command has to send its jobs."""


@dataclass(frozen=True)
class CommandOrder:
    """What a command wants generated."""

    folder: str
    """Its working folder, which relative paths of its request start from."""
    folder_id: tuple[int, int]
    """The device and the inode of that folder: in a container the same path may be another folder."""
    run: RunSettings
    output: OutputSettings
    jobs: tuple[ResolvedJob, ...]
    finished: dict[int, Path]
    """What the command's writer found of an earlier run."""
    journal: bool
    previews: bool
    stdin: bytes | None = None
    keep: float | None = None
    """How many seconds a worker of --keep-warm shall stay after it."""


class _CommandStopped(Interrupted):
    """The command was told to stop, or is gone."""


class Retire(Exception):
    """A command of another version wants this worker to end, to start its own."""


def take_order(wire: Wire) -> CommandOrder | None:
    """Tell a command that it is its turn: what it wants then, or None where it is gone. Raises Retire."""
    with contextlib.suppress(Gone):
        wire.send("start")
        message = wire.receive_within(FIRST_MESSAGE)
        if message is not None and message[0] == "retire":
            raise Retire
        if message is not None and message[0] == "run":
            return CommandOrder(**message[1])
    return None


class SessionProgress:
    """How far the order is that runs now, from which a waiting command's time is estimated."""

    def __init__(self) -> None:
        self._jobs, self._over, self._share, self._began = 0, 0, 0.0, 0.0
        self._last: tuple[float, int] | None = None
        """The seconds and the jobs of the order before."""

    def begin(self, jobs: int) -> None:
        self._jobs, self._over, self._share, self._began = jobs, 0, 0.0, time.monotonic()

    def note(self, event: Event) -> None:
        if isinstance(event, Result):
            self._over, self._share = self._over + 1, 0.0
        elif isinstance(event, Progress):
            self._share = len(event.jobs) * (event.index + 1) / event.count

    def end(self) -> None:
        self._last, self._jobs = (time.monotonic() - self._began, self._jobs), 0

    def seconds_left(self, *, waiting: int = 0) -> float | None:
        """Seconds until the order and those of `waiting` commands are over; None where nothing is known yet.

        What is not known of an order is taken from the one before.
        """
        left = self._of_running()
        if not waiting or left is None:
            return left
        return None if self._last is None else left + waiting * self._last[0]

    def _of_running(self) -> float | None:
        jobs = self._jobs
        if not jobs:
            return 0.0
        done, spent = min(self._over + self._share, jobs), time.monotonic() - self._began
        if done:
            return spent * (jobs - done) / done
        return None if self._last is None else max(0.0, self._last[0] * jobs / self._last[1] - spent)


def carry_out(order: CommandOrder, wire: Wire, cache: ModelCache, progress: SessionProgress) -> None:
    """Generate what a command wants, for as long as it is there to write it."""
    with contextlib.suppress(Gone):
        _carry_out(order, _Dialogue(wire), cache, progress)


def _carry_out(order: CommandOrder, dialogue: _Dialogue, cache: ModelCache, progress: SessionProgress) -> None:
    from sdcli.generation.service import generate

    before = cache.run
    if (order.run.device, order.run.dtype) != (as_option(before.device), before.dtype):
        dialogue.send("broken", "it has another device or dtype")
        return
    progress.begin(len(order.jobs))
    try:
        with _in_folder(order), _given_stdin(order.stdin):
            cache.run = order.run
            events = generate(
                order.jobs, cache, _RemoteWriter(order, dialogue), stop=dialogue.stop, cancelled=dialogue.is_gone
            )
            for event in events:
                progress.note(event)
                _send(event, dialogue, previews=order.previews)
        dialogue.send("end")
    except _CommandStopped:
        dialogue.send("stopped")
    except _Elsewhere:
        dialogue.send("broken", "it does not see the folder of this command")
    except SdcliError as error:
        dialogue.send("raised", packed_error(error))
    except Gone:
        raise
    except Exception as error:  # the command tries it without this worker, and reports it where it happens again
        traceback.print_exc(file=sys.stderr)
        dialogue.send("broken", f"unexpected {type(error).__name__}")
    finally:
        cache.run = before
        progress.end()


class _Dialogue:
    """The wire, with a thread that listens for the stop and the end of the command while this one generates."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._stopped = self._gone = False
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, *message: Any) -> None:
        """Raises Gone."""
        self._wire.send(*message)

    def ask(self, *message: Any) -> Message:
        """Send, and wait for the answer; an error of the command is raised here. Raises Gone, too."""
        self._wire.send(*message)
        return self.answer()

    def answer(self) -> Message:
        answer = self._answers.get()
        if answer is None:
            raise Gone
        if answer[0] == "error":
            raise unpacked_error(answer[1])
        return answer

    def stop(self) -> Interrupted | None:
        return _CommandStopped() if self._stopped or self._gone else None

    def is_gone(self, job: ResolvedJob) -> bool:
        """Whether nobody waits for a job any more: it is left between two steps."""
        return self._gone

    def _listen(self) -> None:
        try:
            while True:
                message = self._wire.receive()
                if message[0] == "stop":
                    self._stopped = True
                else:
                    self._answers.put(message)
        except Gone:
            self._gone = True
            self._answers.put(None)


class _RemoteWriter(Writer):
    """A writer whose files are written by the command."""

    def __init__(self, order: CommandOrder, dialogue: _Dialogue) -> None:
        super().__init__(order.output)
        self._order, self._dialogue = order, dialogue

    def finished(self, jobs: Sequence[ResolvedJob], own: Container[int] | None = None) -> dict[int, Path]:
        return self._order.finished

    def begin(self, jobs: Sequence[ResolvedJob]) -> None:
        if self._order.journal:
            self._dialogue.ask("begin", [job.index for job in jobs])

    def write(self, job: ResolvedJob, data: bytes) -> Path:
        return Path(self._dialogue.ask("write", job.index, data)[1])

    def write_side_files(self, image: Path, files: Iterable[SideFile], *, replace: bool) -> tuple[Path, ...]:
        rest, answer = iter(files), self._dialogue.ask("side files", str(image), replace)
        while answer[0] == "next":
            try:
                file = next(rest, None)
            except SdcliError as error:  # the command's writer raises it, with what it has to add
                answer = self._dialogue.ask("failed file", packed_error(error))
            else:
                answer = self._dialogue.ask("file", file)
        return tuple(map(Path, answer[1]))


def _send(event: Event, dialogue: _Dialogue, *, previews: bool) -> None:
    match event:
        case Phase():
            dialogue.send("phase", event.name, event.jobs, event.detail, event.steps)
        case Progress():
            dialogue.send("progress", event.jobs, event.index, event.count)
            if previews:
                while dialogue.answer()[0] == "preview":
                    image = event.preview()
                    dialogue.send("image", None if image is None else _sent(image))
        case Note():
            dialogue.send("note", event.text, event.jobs)
        case Result():
            dialogue.send(
                "result",
                event.status,
                event.job.index,
                None if event.path is None else str(event.path),
                event.seconds,
                event.fallbacks,
                None if event.error is None else packed_error(event.error),
                tuple(map(str, event.side_files)),
            )


def _sent(image: Image.Image) -> tuple[object, ...]:
    return image.mode, image.size, image.tobytes(), image.info.get("decoded")


class _Elsewhere(Exception):
    """The command's folder is not there for this process."""


@contextlib.contextmanager
def _in_folder(order: CommandOrder) -> Iterator[None]:
    """Work in the command's folder: paths in requests, and in sentences about them, are relative to it."""
    before = os.getcwd()
    try:
        os.chdir(order.folder)
        found = os.stat(".")
    except OSError:
        raise _Elsewhere from None
    try:
        if (found.st_dev, found.st_ino) != order.folder_id:
            raise _Elsewhere
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _given_stdin(data: bytes | None) -> Iterator[None]:
    """Let requests that read an image from stdin, `-`, have what the command read there."""
    before = sys.stdin
    stdin_bytes.cache_clear()
    if data is not None:
        sys.stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    try:
        yield
    finally:
        sys.stdin = before
        stdin_bytes.cache_clear()
