"""Makes stdin, stdout and stderr safe to use: closed ones, full disks, and encodings that lack a character.

A stream that is closed is /dev/null. What stdout cannot take ends the command: with exit code 8, or quietly where the
reader of a pipe has gone. What stderr cannot take is lost, as a run must not end for a note. Characters that an
encoding lacks are written as \\u72d0.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any

from sdcli.errors import BadImage, CannotWrite, Interrupted

NAMES = ("stdin", "stdout", "stderr")


class ReaderGone(Interrupted):
    """The process that reads stdout has closed it, as `head -1` does. Printed nowhere."""

    exit_code = 141


def in_utf8_mode() -> None:
    """Start this process again in Python's UTF-8 mode where the locale knows only ASCII.

    Else prompts would arrive as single bytes, and file names could not be written. Python does that by itself unless
    PYTHONUTF8=0 and PYTHONCOERCECLOCALE=0 forbid it.
    """
    if os.name == "posix" and sys.getfilesystemencoding() in ("ascii", "us-ascii", "ansi_x3.4-1968"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def prepare_streams() -> None:
    """Replace closed streams, and let no stream fail for a character or with an error that is no sentence.

    Streams that another program put in place of Python's own are left alone.
    """
    for number, name in enumerate(NAMES):
        if getattr(sys, name) is None:
            _reopen(number, name)
    for number, name in enumerate(NAMES):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper:
            continue
        if name != "stdin":
            stream.reconfigure(errors="backslashreplace")
        with contextlib.suppress(OSError, ValueError):
            if os.name == "posix" and stream.fileno() == number and not isinstance(_raw(stream), _Descriptor):
                setattr(sys, name, _wrapped(stream, number, name))


def _reopen(number: int, name: str) -> None:
    """Open /dev/null as a stream that is closed, so that no other file gets its number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(descriptor, number)
    if descriptor != number and _is_open(number):
        os.close(descriptor)
        descriptor = number
    mode = "r" if name == "stdin" else "w"
    setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False))


def _is_open(number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(os.devnull))
    except OSError:
        return False


def _raw(stream: Any) -> Any:
    return getattr(stream.buffer, "raw", None)


def _wrapped(stream: io.TextIOWrapper, number: int, name: str) -> io.TextIOWrapper:
    stream.flush()
    raw = {"stdin": _StdinBytes, "stdout": _StdoutBytes, "stderr": _StderrBytes}[name](number)
    buffer = io.BufferedReader(raw) if name == "stdin" else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or name == "stderr",
        write_through=stream.write_through,
    )


class _Descriptor(io.RawIOBase):
    """A descriptor of the process, which stays open."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


class _StdinBytes(_Descriptor):
    """stdin. Raises BadImage, whose sentence fits every command, for what cannot be read, such as a folder."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = os.read(self._number, len(buffer))
        except OSError as error:
            raise BadImage(f"cannot read stdin: {error.strerror}") from None
        buffer[: len(data)] = data
        return len(data)


class _StdoutBytes(_Descriptor):
    """stdout. Raises CannotWrite or ReaderGone once; what is still in Python's buffers is dropped then."""

    _failed = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            return _written(self._number, data)
        except BrokenPipeError:
            self._failed = True
            raise ReaderGone from None
        except OSError as error:
            self._failed = True
            raise CannotWrite(f"cannot write to stdout: {error.strerror}") from None
        except BaseException:  # of a signal's handler, perhaps after the bytes went out: they must not go out twice
            self._failed = True
            raise


class _StderrBytes(_Descriptor):
    """stderr, which loses what it cannot take."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return _written(self._number, data)
        except OSError:
            return len(data)


def _written(number: int, data: Any) -> int:
    """Write to a descriptor, also to one that does not block but is busy. Raises OSError."""
    while True:
        try:
            return os.write(number, data)
        except BlockingIOError:
            select.select([], [number], [])
