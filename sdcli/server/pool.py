"""The worker processes of a server: started, watched, and started again when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import send_handle

from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import RunSettings
from sdcli.server.protocol import Lend, Order, Ready, Report
from sdcli.server.worker import work


class WorkerProcess:
    """One worker process of a device. `on_report` and `on_death` are called in the event loop."""

    def __init__(
        self,
        number: int,
        settings: RunSettings,
        *,
        on_report: Callable[[WorkerProcess, Report], None],
        on_death: Callable[[WorkerProcess, str], None],
        preload: Sequence[ResolvedJob] = (),
        threads: int | None = None,
    ) -> None:
        self.number, self.settings = number, settings
        self.ready = False
        self._preload, self._threads = tuple(preload), threads
        self._on_report, self._on_death = on_report, on_death
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process. Spawned, never forked: the server has threads, and torch would have, too."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.ready, self._connection = False, ours
        arguments = (theirs, self.settings, self._preload, self._threads)
        self._process = context.Process(target=work, args=arguments, name=f"sdcli worker {self.number}")
        self._process.start()
        theirs.close()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, args=(loop, ours, self._process), daemon=True).start()

    def send(self, order: Order) -> None:
        """Give an order; for a process that has just died nothing happens, `on_death` comes."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(order)

    def lend(self, id: str, connection: socket.socket) -> None:
        """Let the process generate for the command at the other end of a connection, of which it gets a copy."""
        if self._connection is not None and self.pid is not None:
            with contextlib.suppress(OSError):
                self._connection.send(Lend(id))
                send_handle(self._connection, connection.fileno(), self.pid)

    def close(self) -> None:
        """End the process, by force where it does not end at once; nothing happens to one that has ended."""
        self._closing, self.ready = True, False
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
        if self._process is not None:
            self._process.join(timeout=2)
        self.kill()

    def kill(self) -> None:
        """End the process by force."""
        self._closing, self.ready = True, False
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, loop: asyncio.AbstractEventLoop, connection: Connection, process: SpawnProcess) -> None:
        """Pass the reports of one process into the event loop, in a thread of its own."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            with contextlib.suppress(EOFError, OSError):
                while True:
                    report = connection.recv()
                    loop.call_soon_threadsafe(self._report, report)
            process.join()
            connection.close()
            loop.call_soon_threadsafe(self._died, _cause(process.exitcode))

    def _report(self, report: Report) -> None:
        self.ready = self.ready or (isinstance(report, Ready) and not self._closing)
        self._on_report(self, report)

    def _died(self, cause: str) -> None:
        self.ready = False
        if not self._closing:
            self._on_death(self, cause)


def _cause(code: int | None) -> str:
    """Why a process ended, from its exit code."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
