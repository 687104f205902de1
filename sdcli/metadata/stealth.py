"""Texts hidden in the lowest bits of an image's pixels, as NovelAI and an extension of A1111 hide their records."""

from __future__ import annotations

import json
import zlib

from PIL import Image

from sdcli.io.json_files import parse_json

MAX_BYTES = 4 * 2**20
"""Bytes of a hidden text, unpacked."""
_MARKS = {b"stealth_pnginfo": (1, False), b"stealth_pngcomp": (1, True)} | {
    b"stealth_rgbinfo": (3, False),
    b"stealth_rgbcomp": (3, True),
}
"""The first bytes -> the channels whose lowest bits are used (alpha alone, or red, green and blue), and gzip or not."""
_HEAD_BITS = 8 * 15 + 32


def stealth_texts(image: Image.Image) -> dict[str, str]:
    """Key -> text of what is hidden in a decoded image; empty if nothing is.

    The bits run down the columns, from left to right: a mark of 15 bytes, the number of bits as 32 bits, the text.
    NovelAI hides a JSON object of the texts that it writes into PNG chunks, others the text of `parameters`.
    """
    if image.format == "JPEG" or image.mode not in ("RGBA", "RGB") or image.width * image.height <= _HEAD_BITS:
        return {}
    for channels in (1, 3):
        if channels == 1 and image.mode != "RGBA":
            continue
        text = _hidden(image, channels)
        if text is None:
            continue
        try:
            value = parse_json(text, strict=True)
        except ValueError:
            return {"parameters": text}
        if isinstance(value, dict):
            return {key: one if isinstance(one, str) else json.dumps(one) for key, one in value.items()}
        return {"parameters": text}
    return {}


def _hidden(image: Image.Image, channels: int) -> str | None:
    """The text hidden in one channel or in three; None if there is no mark, or no such text behind it."""
    mark = _packed(_levels(image, channels, 0, _HEAD_BITS))
    known = _MARKS.get(mark[:15])
    if known is None or known[0] != channels:
        return None
    bits = int.from_bytes(mark[15:19], "big")
    room = image.width * image.height * channels - _HEAD_BITS
    if bits % 8 or not 0 < bits <= min(room, MAX_BYTES * 8):
        return None
    import numpy as np  # rare, and not worth its import time for every command that opens an image

    levels = np.frombuffer(_levels(image, channels, _HEAD_BITS, bits), dtype=np.uint8)
    data = bytes(np.packbits(levels & 1).tobytes())
    try:
        if known[1]:
            data = zlib.decompressobj(wbits=31).decompress(data, MAX_BYTES)
        return data.decode("utf-8")
    except (zlib.error, UnicodeDecodeError):
        return None


def _levels(image: Image.Image, channels: int, start: int, count: int) -> bytes:
    """`count` values of the channels from the `start`-th on, down the columns from left to right."""
    first, last = start // channels // image.height, (start + count - 1) // channels // image.height
    columns = image.crop((first, 0, last + 1, image.height)).transpose(Image.Transpose.TRANSPOSE)
    data = columns.getchannel("A").tobytes() if channels == 1 else columns.convert("RGB").tobytes()
    return data[start - first * image.height * channels :][:count]


def _packed(levels: bytes) -> bytes:
    bits = "".join(str(level & 1) for level in levels)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")
