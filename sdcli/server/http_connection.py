"""A client's connection to the server, which is dropped when the client reads nothing any more.

A response waits for its reader, so that what is not read yet takes no memory beyond the buffers of one connection. A
client that stops reading and stays connected would hold these, its file descriptor and its job for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from array import array
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("sdcli.server")

UNREAD = 30.0
"""Seconds after which a client is dropped that reads nothing while there is something for it."""


class HttpConnection(H11Protocol):
    """uvicorn's protocol. asyncio calls `pause_writing` while the buffer is full, and then `resume_writing`."""

    _left = 0
    """Bytes that were not read yet when it was last looked."""
    _timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._left = self._unread()
        self._timer = self.loop.call_later(UNREAD, self._look)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if self._unread() < self._left:  # slow, but it reads
            self._wait()
            return
        log.info("a client that has read nothing for %g s was dropped", UNREAD)
        self.transport.abort()

    def _unread(self) -> int:
        """Bytes for the client in this process and, where the system tells, in its socket's buffer.

        The kernel takes more only when a good part of its own buffer, which can have megabytes, is empty.
        """
        return self.transport.get_write_buffer_size() + _in_socket(self.transport.get_extra_info("socket"))


def _in_socket(socket: Any) -> int:
    """Bytes that were sent and are not acknowledged; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    count = array("i", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, count)
    return count[0]
