"""Decodes text that people and other programs wrote: UTF-8, or UTF-16 and UTF-32 that begin with a byte-order mark."""

from __future__ import annotations

import codecs
import io
import re
from typing import Any, BinaryIO

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b]")
"""Control characters without tab, ends of lines and the separators that Python counts as white space."""
CHUNK = 2**16
"""Bytes that are decoded at a time."""


class NotText(ValueError):
    """Bytes that are no text. `reason` is a predicate, `byte` the offset of the first byte that is wrong."""

    def __init__(self, reason: str, byte: int) -> None:
        super().__init__(f"{reason} (byte {byte:,})")
        self.reason, self.byte = reason, byte


def decode_text(data: bytes) -> str:
    """The text of a whole file, without its byte-order mark.

    Raises NotText for what is neither UTF-8 nor marked as UTF-16 or UTF-32, and for control characters other than white
    space: UTF-16 without a mark has them, in Latin and Cyrillic letters and at ends of lines. No tokenizer accepts NUL.
    """
    mark, encoding, name = next((mark for mark in _MARKS if data.startswith(mark[0])), (b"", "utf-8", "UTF-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise NotText(f"is not {name} text", len(mark) + error.start) from None
    control = control_character(text)
    if control is not None:
        raise NotText(control[0], len(mark) + len(text[: control[1]].encode(encoding)))
    return text


def control_character(text: str) -> tuple[str, int] | None:
    """The first control character of a text as a predicate, `holds a NUL character`, and its place; else None."""
    match = _CONTROL.search(text)
    if match is None:
        return None
    name = "a NUL character" if match[0] == "\0" else f"the control character U+{ord(match[0]):04X}"
    return f"holds {name}", match.start()


def utf8_stream(file: BinaryIO) -> BinaryIO:
    """A seekable file at its start, or where it is marked as UTF-16 or UTF-32 a stream of the same text as UTF-8.

    What is no text there becomes bytes that are not UTF-8, for the reader of the stream to refuse.
    """
    start = file.read(4)
    file.seek(0)
    mark, encoding, _ = next((mark for mark in _MARKS if start.startswith(mark[0])), (b"", "utf-8", ""))
    if encoding == "utf-8":
        return file
    file.seek(len(mark))
    return io.BufferedReader(_Recoded(file, encoding))


class _Recoded(io.RawIOBase):
    """Reads a file of another encoding as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._waiting = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting and not self._ended:
            data = self._file.read(CHUNK)
            self._ended = not data
            try:
                self._waiting = self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError:  # half a character at the end, or a number beyond Unicode
                self._waiting, self._ended = b"\xff", True
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size
