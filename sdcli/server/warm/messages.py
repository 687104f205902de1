"""How a command and a warm worker talk: tuples of plain values over a socket, and errors that keep their class.

The tuples are pickled, since jobs hold specs, requests and paths that must arrive exactly as they are. Both ends are
processes of one user, which the folder, the socket's mode and the kernel (SO_PEERCRED) vouch for before a byte is
read; nevertheless only the classes of a job are ever looked up, and in what a worker sends none at all. The framing is
our own, as `multiprocessing.connection` would add a tenth of a warm command's imports.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import select
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

Message = tuple[Any, ...]
"""Its kind, a word, and its values."""
LARGEST = 2**31
"""Bytes of a message."""
_HEADER = struct.Struct("!Q")
_CLASSES = ("sdcli.generation.resolve.jobs", "sdcli.generation.settings", "sdcli.models.", "sdcli.request.")
"""Where the classes of a job are; a full name, or the beginning of one that ends in a dot."""
_FUNCTIONS = {("sdcli.models.families", "family_named"), ("builtins", "frozenset"), ("builtins", "set")}


class Gone(Exception):
    """The other end has closed the connection, or sent what is no message."""


class Wire:
    """One end of a connection. `trusting` lets the classes of jobs in."""

    def __init__(self, connection: socket.socket, *, trusting: bool = False) -> None:
        self._socket, self._trusting = connection, trusting
        connection.settimeout(None)

    def send(self, *message: Any) -> None:
        """Raises Gone."""
        data = pickle.dumps(message, protocol=5)
        try:
            self._socket.sendall(_HEADER.pack(len(data)) + data)
        except OSError:
            raise Gone from None

    def receive(self) -> Message:
        """The next message; waits for it. Raises Gone."""
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        if size > LARGEST:
            raise Gone
        try:
            message = _Unpickler(io.BytesIO(self._read(size)), trusting=self._trusting).load()
        except Exception as error:  # whatever damaged bytes lead to
            raise Gone(str(error)) from None
        if not isinstance(message, tuple) or not message:
            raise Gone
        return message

    def wait(self, seconds: float) -> bool:
        """Whether something can be received within that time."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(max(0.0, seconds) * 1000))

    def receive_within(self, seconds: float) -> Message | None:
        """The next message, or None where it does not begin within that time. Raises Gone."""
        return self.receive() if self.wait(seconds) else None

    def receive_while(self, every: float, do: Callable[[], None]) -> Message:
        """The next message; `do` is called first, and every so many seconds until there is one. Raises Gone."""
        do()
        while not self.wait(every):
            do()
        return self.receive()

    def close(self) -> None:
        """Close this end, also while another thread waits for a message."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            try:
                count = self._socket.recv_into(rest)
            except OSError:
                raise Gone from None
            if not count:
                raise Gone
            rest = rest[count:]
        return bytes(data)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, trusting: bool) -> None:
        super().__init__(file)
        self._trusting = trusting

    def find_class(self, module: str, name: str) -> Any:
        if self._trusting:
            if (module, name) in _FUNCTIONS:
                return super().find_class(module, name)
            if module.startswith("pathlib") or any(
                module == one or (one.endswith(".") and module.startswith(one)) for one in _CLASSES
            ):
                found = super().find_class(module, name)
                if isinstance(found, type) and found.__module__ == module:
                    return found
        raise pickle.UnpicklingError(f"{module}.{name} is not sent here")


def greeting(
    facts: Mapping[str, str], *, seconds_left: float | None, patience: float, place: int = 0, retires: bool = False
) -> Message:
    """What a worker sends first.

    `seconds_left`: until it is free, None where that is not known. `patience`: seconds that beginning without it would
    take. `place`: in the queue; 0 where it is the command's turn. `retires`: whether it makes room for a newer one.

    Then come its place whenever it changes, "start" when it is its turn, and from the command what it wants generated.
    """
    return "hello", {
        "identity": facts,
        "pid": os.getpid(),
        "seconds_left": seconds_left,
        "patience": patience,
        "place": place,
        "retires": retires,
    }
