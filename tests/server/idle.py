"""A server without workers in this process, for tests of the page: its jobs wait, or do what a test says."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image

from sdcli.metadata.embed import image_bytes, parameters_text
from sdcli.metadata.record import Record
from sdcli.models.registry import load_registry
from sdcli.server.app import make_app
from sdcli.server.engine import Engine
from sdcli.server.jobs import Job
from sdcli.server.protocol import ImageDone, ImageFailed, PreviewImage
from sdcli.server.run import http_config
from sdcli.server.settings import ServerSettings


class IdleServer:
    """A server whose jobs are played by the test. All methods may be called from the test's thread."""

    def __init__(self, engine: Engine, url: str, server: uvicorn.Server) -> None:
        self.engine, self.url, self._server = engine, url, server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def jobs(self) -> list[Job]:
        """All jobs, in the order of their submission."""
        return list(self.engine.store)

    def in_loop(self, action: Callable[[], None]) -> None:
        """Run something in the event loop's thread, where jobs are changed."""
        done = threading.Event()
        self.engine._tasks[0].get_loop().call_soon_threadsafe(lambda: (action(), done.set()))
        assert done.wait(20)

    @property
    def unread(self) -> list[int]:
        """The bytes in this process that wait for their reader, of each connection."""
        return [one.transport.get_write_buffer_size() for one in list(self._server.server_state.connections)]

    def begin(self, job: Job) -> None:
        """A worker takes the job."""

        def act() -> None:
            self.engine._queue.remove(job)
            job.start()
            job.add({"type": "running"})

        self.in_loop(act)

    def step(self, job: Job, step: int, steps: int, *, preview: bool = False) -> None:
        """A denoising step of all images that are not done, 2 a second."""

        def act() -> None:
            open_images = [one.index for one in job.images if one.index not in job.done]
            left = (steps - step) / 2
            event = {"type": "step", "images": open_images, "step": step, "steps": steps}
            job.progress = step / steps
            job.add({**event, "per_second": 2.0, "progress": job.progress, "seconds_left": left})
            if preview:
                data = _png(Image.new("RGB", (8, 8), "orange"))
                job.preview = job.previews[open_images[0]] = PreviewImage(job.id, open_images[0], step, data)
                job.add({"type": "preview", "image": open_images[0], "step": step, "bytes": 1})

        self.in_loop(act)

    def finish(self, job: Job, *, failing: str | None = None) -> None:
        """All images of the job are done (16x16, in a colour of their own), or fail with a sentence."""

        def act() -> None:
            for one in job.images:
                if failing is not None:
                    job.failed[one.index] = ImageFailed(job.id, one.index, "error", failing)
                    job.add({"type": "failed", "image": one.index, "kind": "error", "error": failing})
                    continue
                picture = Image.new("RGB", (16, 16), (40 * one.index, 120, 200))
                record = Record(one.request, {})
                data = image_bytes(picture, "png", record)
                done = ImageDone(job.id, one.index, data, one.request.typed(), parameters_text(record), 0.5)
                job.done[one.index] = done
                job.add({"type": "image", "image": one.index, "seconds": 0.5})
            job.finish()

        self.in_loop(act)


@contextmanager
def idle_server(*, port: int = 0, **settings: Any) -> Iterator[IdleServer]:
    """A server on a port of this machine, in a thread; ended at the end with its connections."""
    app, engine = make_app(ServerSettings(devices=(), **settings), load_registry())
    listening = socket.create_server(("127.0.0.1", port))
    config = http_config(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        ends = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < ends
            time.sleep(0.01)
        loop = engine._tasks[0].get_loop()
        yield IdleServer(engine, f"http://127.0.0.1:{listening.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        ends = time.monotonic() + 30
        while thread.is_alive() and time.monotonic() < ends:  # as when a process ends, all connections break
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: [one.transport.abort() for one in server.server_state.connections])
            thread.join(0.05)
        listening.close()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
