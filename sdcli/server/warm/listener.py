"""The Unix socket of a server, through which `sdcli generate` borrows a free worker process.

The front only greets: it hands the connection itself to the worker, which then talks to the command as one of
--keep-warm does (`session.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from sdcli.errors import SdcliError
from sdcli.server.settings import ServerSettings, worker_devices
from sdcli.server.warm.identity import identity
from sdcli.server.warm.messages import Gone, Wire, greeting
from sdcli.server.warm.place import Place, Unsafe, as_option, check_peer, possible

log = logging.getLogger("sdcli.server")

PATIENCE = 1.0
"""Seconds that beginning without a worker takes at least: importing torch."""


class CommandListener:
    """Listens from `open` to `close`, in the event loop.

    `can_lend` says whether a worker is free, to which `lend` gives a connection.
    """

    def __init__(
        self, settings: ServerSettings, *, can_lend: Callable[[], bool], lend: Callable[[socket.socket], None]
    ) -> None:
        self._settings, self._can_lend, self._lend = settings, can_lend, lend
        self._place: Place | None = None
        self._listener: socket.socket | None = None
        self._lock: int | None = None
        self._facts: dict[str, str] = {}

    def open(self) -> None:
        """Listen, or log why the command line cannot use this server; that is no reason not to serve."""
        if not possible():
            return
        names = [as_option(device) for device in worker_devices(self._settings.devices)]
        devices = set(names)
        if len(devices) != 1 or ":" in names[0] or names.count("cpu") > 1:  # which share the cores: other bytes
            log.info("`sdcli generate` does not use these workers: they do not compute as a command does")
            return
        place = Place(devices.pop(), self._settings.run.dtype)
        try:
            self._lock = place.lock()
            if self._lock is None:
                log.info("`sdcli generate` uses another worker, which listens on %s", place.address)
                return
            self._listener, self._place = place.listen(), place
        except (SdcliError, OSError) as error:
            log.warning("`sdcli generate` cannot use this server: %s", error)
            self.close()
            return
        self._facts = identity()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept, self._listener)
        log.info("`sdcli generate` uses this server through %s", place.address)

    def close(self) -> None:
        if self._listener is not None and self._place is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._place.address.unlink(missing_ok=True)  # before the lock is free, so that it is this server's own
            self._listener.close()
            self._listener = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(Unsafe, Gone, OSError):
            check_peer(connection)
            free = self._can_lend()
            Wire(connection).send(*greeting(self._facts, seconds_left=0.0 if free else None, patience=PATIENCE))
            if free:  # only now: the worker itself says that it begins
                self._lend(connection)
