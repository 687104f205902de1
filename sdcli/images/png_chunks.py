"""The chunks of a PNG file: their places, their texts unpacked within a limit, and a copy without refused ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sdcli.errors import BadImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_UNPACKED = 16 * 2**20
"""Bytes of the largest text or colour profile that is read."""
MAX_IN_ALL = 64 * 2**20
"""Bytes of all texts and profiles of an image."""
_PILLOW_LIMIT = 2**20
"""Bytes of an unpacked chunk that Pillow reads; it refuses the whole image for a larger one."""
TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class PngChunk(NamedTuple):
    """A chunk's type, and the place and length of its data in the file."""

    kind: bytes
    offset: int
    length: int


def png_chunks(file: BinaryIO) -> Iterator[PngChunk]:
    """The chunks of a PNG file up to IEND, or up to where it is damaged; nothing for another file."""
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return
    end = file.seek(0, io.SEEK_END)
    position, kind = len(SIGNATURE), b""
    while kind != b"IEND" and position + 12 <= end:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if position + 12 + length > end:
            return
        yield PngChunk(kind, position + 8, length)
        position += 12 + length


def chunk_data(file: BinaryIO, chunk: PngChunk) -> bytes:
    """The data of a chunk; of one that is over the limit so much that this can be seen."""
    file.seek(chunk.offset)
    return file.read(min(chunk.length, MAX_UNPACKED + 4096))


def is_sound(file: BinaryIO, chunk: PngChunk) -> bool:
    """Whether a text or profile has its checksum and a known way of packing; Pillow refuses the image otherwise."""
    data = chunk_data(file, chunk)
    file.seek(chunk.offset + chunk.length)
    (checksum,) = struct.unpack(">I", file.read(4))
    if len(data) < chunk.length or zlib.crc32(chunk.kind + data) != checksum:
        return False
    rest = data.partition(b"\0")[2]
    return rest[:1] == b"\0" if chunk.kind in (b"zTXt", b"iCCP") else chunk.kind == b"tEXt" or rest[1:2] == b"\0"


def unpacked_text(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Keyword and text of the data of a tEXt, zTXt or iTXt chunk, or name and profile of an iCCP chunk.

    Raises BadImage, in memory bounded by MAX_UNPACKED.
    """
    keyword, _, rest = data.partition(b"\0")
    packed = kind in (b"zTXt", b"iCCP")
    if packed:
        rest = rest[1:]
    elif kind == b"iTXt":
        packed = rest[:1] == b"\1"
        _language, _, rest = rest[2:].partition(b"\0")
        _translated, _, rest = rest.partition(b"\0")
    text = _unpacked(rest) if packed else rest
    if len(text) > MAX_UNPACKED:
        name = "colour profile" if kind == b"iCCP" else f"text {keyword[:79].decode('latin-1')!r}"
        raise BadImage(f"cannot be read: its {name} is larger than {MAX_UNPACKED // 2**20} MiB")
    return keyword, text


def without_refused_chunks(file: Path | io.BytesIO) -> Path | io.BytesIO:
    """The file, or a copy without the texts and colour profiles, large or damaged, for which Pillow refuses all of it.

    The pixels need neither. Raises BadImage for what is over our own limits.
    """
    if isinstance(file, io.BytesIO):
        dropped = _refused(file)
        file.seek(0)
        return _copy(file, dropped) if dropped else file
    with file.open("rb") as opened:
        dropped = _refused(opened)
        return _copy(opened, dropped) if dropped else file


def _refused(file: BinaryIO) -> list[PngChunk]:
    dropped, in_all = [], 0
    for chunk in png_chunks(file):
        if chunk.kind not in (*TEXTS, b"iCCP"):
            continue
        size = len(unpacked_text(chunk.kind, chunk_data(file, chunk))[1])
        in_all += size
        if in_all > MAX_IN_ALL:
            raise BadImage(f"cannot be read: its texts are larger than {MAX_IN_ALL // 2**20} MiB in all")
        # Pillow has a limit for all texts, too.
        if size > _PILLOW_LIMIT or in_all > MAX_IN_ALL // 2 or not is_sound(file, chunk):
            dropped.append(chunk)
    return dropped


def _copy(file: BinaryIO, dropped: list[PngChunk]) -> io.BytesIO:
    copy, position = io.BytesIO(), 0
    for chunk in dropped:
        file.seek(position)
        copy.write(file.read(chunk.offset - 8 - position))
        position = chunk.offset + chunk.length + 4
    file.seek(position)
    copy.write(file.read())
    copy.seek(0)
    return copy


def _unpacked(data: bytes) -> bytes:
    """A zlib stream as bytes, at most one more than the limit; empty if it is damaged."""
    try:
        return zlib.decompressobj().decompress(data, MAX_UNPACKED + 1)
    except zlib.error:
        return b""
