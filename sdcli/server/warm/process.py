"""The worker of `generate --keep-warm`: a process that ends by itself when no command has come for a while.

It is started by a command and outlives it: a session of its own, its output in a log beside the socket. `main` listens
before it imports torch, so the command that started it waits for no more than it would have to import itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from sdcli.errors import CannotWrite, Terminated
from sdcli.io.files import PACKAGE
from sdcli.io.threads import wait_without_spinning
from sdcli.server.warm.identity import identity
from sdcli.server.warm.messages import Gone, Message, Wire, greeting
from sdcli.server.warm.place import Place, Unsafe, check_folder, check_peer
from sdcli.server.warm.waiting import WaitingCommands

if TYPE_CHECKING:
    from sdcli.server.warm.session import SessionProgress

BEGIN = 5.0
"""Seconds that a new worker waits for an outdated one to end, for another new one to listen, or for the command that
started it."""
LAST_CALL = 0.2
"""Seconds for which an ending worker still serves a command that had found its socket."""


def start(place: Place, keep: float, *, instead: bool = False) -> None:
    """Start a worker in the background, or `instead` of one that is ending; returns when one listens.

    Of two that are started at once one ends at once. Raises CannotWrite, and Unsafe.
    """
    check_folder(create=True)
    ready, theirs = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        log = os.open(place.log, flags, 0o600)
        try:
            subprocess.Popen(
                [sys.executable, "-m", __name__, place.device, place.dtype, str(keep), str(theirs), str(int(instead))],
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(log)
            os.close(theirs)
        if not os.read(ready, 1):
            raise CannotWrite(f"the warm worker did not start; {place.log} says why")
    except OSError as error:
        raise CannotWrite(f"cannot start a warm worker: {error.strerror or error}") from None
    finally:
        os.close(ready)


def _import_paths() -> list[str]:
    """PYTHONPATH of the worker, which imports the same package as this process."""
    return [str(PACKAGE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def main() -> NoReturn:
    """The process: `python -m sdcli.server.warm.process DEVICE DTYPE SECONDS DESCRIPTOR INSTEAD`."""
    device, dtype, keep, ready, instead = sys.argv[1:]
    wait_without_spinning()
    place, descriptor = Place(device, dtype), int(ready)
    facts = identity()
    lock = _lock(place, instead=bool(int(instead)))
    if lock is None:
        os.write(descriptor, b"1" if place.exists() else b"")
        sys.exit(0)
    os.ftruncate(sys.stdout.fileno(), 0)
    listener = place.listen()
    os.write(descriptor, b"1")
    os.close(descriptor)
    print(f"process {os.getpid()} listens on {place.address}", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _WarmWorker(place, listener, facts).serve(float(keep))
    except Terminated:
        pass
    finally:
        place.address.unlink(missing_ok=True)  # before the lock is free, so that it is this worker's own
        os.close(lock)
    os._exit(0)  # threads that wait for a command may be left


def _lock(place: Place, *, instead: bool) -> int | None:
    """The lock of the place; None where another worker listens there."""
    deadline = time.monotonic() + BEGIN
    while (lock := place.lock()) is None and time.monotonic() < deadline and (instead or not place.exists()):
        time.sleep(0.02)
    return lock


def _terminated(*_: object) -> NoReturn:
    raise Terminated


class _WarmWorker:
    """Accepts in a thread, and serves one command after the other in the main thread, where torch is."""

    def __init__(self, place: Place, listener: socket.socket, facts: dict[str, str]) -> None:
        self._place, self._listener, self._facts = place, listener, facts
        self._commands = WaitingCommands()
        self._progress: SessionProgress | None = None
        """None until torch is imported."""
        self._patience = math.inf
        """As long as it starts itself no command would be faster without it."""

    def serve(self, keep: float) -> None:
        """Until no command has come for `keep` seconds, or for those that the last one named."""
        threading.Thread(target=self._accept, daemon=True).start()
        first = self._commands.take(BEGIN)  # greeted now: nothing else happens in this process while torch is imported
        began = time.monotonic()
        from sdcli.generation.model_cache import ModelCache
        from sdcli.generation.settings import RunSettings
        from sdcli.server.warm.session import Retire, SessionProgress, carry_out, take_order

        cache = ModelCache(RunSettings(device=self._place.device, dtype=self._place.dtype))
        self._progress = SessionProgress()
        self._patience = time.monotonic() - began
        ending = False
        while True:
            wire, first = first or self._commands.take(LAST_CALL if ending else keep), None
            if wire is None:
                if ending:
                    return
                self._place.address.unlink(missing_ok=True)
                ending = True
                continue
            try:
                order = take_order(wire)
                if order is not None:
                    keep = order.keep or keep
                    carry_out(order, wire, cache, self._progress)
            except Retire:
                return
            finally:
                wire.close()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(Unsafe, Gone, OSError):
                check_peer(connection)
                self._commands.add(Wire(connection, trusting=True), self._greeting)

    def _greeting(self, place: int) -> Message:
        left: float | None = 0.0  # until torch is imported, which every command would have to do without this worker
        if self._progress is not None:
            left = self._progress.seconds_left(waiting=len(self._commands))
        return greeting(self._facts, seconds_left=left, patience=self._patience, place=place, retires=True)


if __name__ == "__main__":
    main()
