"""Removes all metadata from a PNG, JPEG or WebP file without encoding its pixels again."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

from sdcli.errors import BadImage
from sdcli.images.image_files import open_safely
from sdcli.metadata.xmp import APP1, jpeg_segment


def strip(data: bytes) -> bytes:
    """The same image file without metadata.

    Colour profiles stay, and so does an EXIF orientation other than upright: both change what is seen.
    Raises BadImage.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _PNG_SIGNATURE + b"".join(_kept_png_chunks(data, _orientation(data)))
        if data.startswith(b"\xff\xd8"):
            return b"\xff\xd8" + b"".join(_kept_jpeg_segments(data, _orientation(data)))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            body = b"WEBP" + b"".join(_kept_webp_chunks(data, _orientation(data)))
            return b"RIFF" + struct.pack("<I", len(body)) + body
    except (struct.error, IndexError):
        raise BadImage("the image is truncated or damaged") from None
    raise BadImage("only PNG, JPEG and WebP images can be stripped")


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT"}
_PNG_COLOUR = {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"cICP", b"mDCV", b"cLLI", b"bKGD", b"pHYs"}


def _kept_png_chunks(data: bytes, orientation: int) -> Iterator[bytes]:
    position, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + length + 12]
        if len(chunk) < length + 12:
            raise IndexError
        if kind in _PNG_PIXELS or kind in _PNG_COLOUR:
            yield chunk
        if kind == b"IHDR" and orientation > 1:
            body = b"eXIf" + _orientation_exif(orientation)
            yield struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        position += len(chunk)


_APP0, _APP2, _APP14, _APP15 = 0xE0, 0xE2, 0xEE, 0xEF
_COMMENT, _SCAN, _END = 0xFE, 0xDA, 0xD9
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def _kept_jpeg_segments(data: bytes, orientation: int) -> Iterator[bytes]:
    position = 2
    if orientation > 1:
        yield jpeg_segment(APP1, b"Exif\0\0" + _orientation_exif(orientation))
    while True:
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        if data[position] != 0xFF:
            raise IndexError
        marker = data[position + 1]
        if marker == _END:
            yield b"\xff\xd9"  # what follows the end is not part of the image
            return
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position : position + 2 + length]
        if len(segment) < 2 + length or length < 2:
            raise IndexError
        position += len(segment)
        if _is_visible(marker, segment[4:]):
            yield segment
        if marker == _SCAN:
            following = _NEXT_MARKER.search(data, position)
            if following is None:
                raise IndexError
            yield data[position : following.start()]
            position = following.start()


def _is_visible(marker: int, body: bytes) -> bool:
    """Whether a segment is needed to display the image: all but comments and most application segments."""
    if marker in _JPEG_APPLICATIONS:
        return body.startswith(_JPEG_APPLICATIONS[marker])
    return marker != _COMMENT and not _APP0 <= marker <= _APP15


_JPEG_APPLICATIONS = {_APP0: b"JFIF\0", _APP2: b"ICC_PROFILE\0", _APP14: b"Adobe"}
"""The application segments that are kept; Adobe's defines the colour transform."""

_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"}
_WEBP_EXIF_FLAG, _WEBP_XMP_FLAG = 0x08, 0x04


def _kept_webp_chunks(data: bytes, orientation: int) -> Iterator[bytes]:
    (size,) = struct.unpack_from("<I", data, 4)
    position, end = 12, 8 + size
    if end > len(data):
        raise IndexError
    extended = False
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        if len(body) < length:
            raise IndexError
        if kind == b"VP8X":
            extended = True
            exif = _WEBP_EXIF_FLAG if orientation > 1 else 0
            flags = (body[0] & ~(_WEBP_EXIF_FLAG | _WEBP_XMP_FLAG)) | exif
            yield _webp_chunk(kind, bytes([flags]) + body[1:])
        elif kind in _WEBP_PIXELS:
            yield _webp_chunk(kind, body)
        position += 8 + length + length % 2
    if extended and orientation > 1:
        yield _webp_chunk(b"EXIF", _orientation_exif(orientation))


def _webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is none."""
    with open_safely(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")
