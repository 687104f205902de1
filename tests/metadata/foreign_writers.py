"""What other tools write, as far as tests need it: their texts, and the bytes of these in each kind of file."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from functools import cache
from typing import Any, Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

Order = Literal["<", ">"]


@cache
def blank(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "navy").save(file, format=format)
    return file.getvalue()


# containers


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, late: bool = False) -> bytes:
    """A PNG with more chunks, before the pixels or after them."""
    data = blank("PNG")
    place = len(data) - 12 if late else 33
    return data[:place] + b"".join(chunks) + data[place:]


def text_chunk(key: str, data: bytes, kind: str = "tEXt") -> bytes:
    head = key.encode("latin-1") + b"\0"
    match kind:
        case "tEXt":
            return png_chunk(b"tEXt", head + data)
        case "zTXt":
            return png_chunk(b"zTXt", head + b"\0" + zlib.compress(data))
        case "iTXt":
            return png_chunk(b"iTXt", head + b"\0\0\0\0" + data)
        case _:
            return png_chunk(b"iTXt", head + b"\1\0de\0Titel\0" + zlib.compress(data))


def exif(fields: dict[int, tuple[int, bytes]], inner: dict[int, tuple[int, bytes]], order: Order = ">") -> bytes:
    """TIFF data with the fields (tag -> type, bytes) of IFD0 and of the Exif IFD."""

    def directory(entries: dict[int, tuple[int, bytes]], start: int, pointer: int | None) -> bytes:
        count = len(entries) + (pointer is not None)
        place = start + 2 + 12 * count + 4
        rows, rest = b"", b""
        both = {**entries, **({0x8769: (4, struct.pack(f"{order}I", pointer))} if pointer is not None else {})}
        for tag, (kind, data) in sorted(both.items()):
            number = 1 if kind == 4 else len(data)
            value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", place + len(rest))
            rows += struct.pack(f"{order}HHI", tag, kind, number) + value
            rest += data + b"\0" * (len(data) % 2) if len(data) > 4 else b""
        return struct.pack(f"{order}H", count) + rows + struct.pack(f"{order}I", 0) + rest

    first = directory(fields, 8, 0 if inner else None)
    if inner:
        first = directory(fields, 8, 8 + len(first))
    second = directory(inner, 8 + len(first), None) if inner else b""
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + first + second


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    data = blank("JPEG")
    return (
        data[:2] + b"".join(struct.pack(">BBH", 0xFF, mark, len(body) + 2) + body for mark, body in segments) + data[2:]
    )


def webp(exif_data: bytes = b"", xmp: bytes = b"") -> bytes:
    flags = (0x08 if exif_data else 0) | (0x04 if xmp else 0)
    chunks = [(b"VP8X", struct.pack("<I", flags) + (15).to_bytes(3, "little") * 2), (b"VP8 ", blank("WEBP")[20:])]
    chunks += [(b"EXIF", exif_data)] if exif_data else []
    chunks += [(b"XMP ", xmp)] if xmp else []
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_exif(format: str, data: bytes) -> bytes:
    match format:
        case "png":
            return png(png_chunk(b"eXIf", data))
        case "jpeg":
            return jpeg((0xE1, b"Exif\0\0" + data))
        case _:
            return webp(data)


COMMENT = 0x9286


def commented(comment: bytes, *, format: str = "jpeg", inner: bool = True, kind: int = 7, order: Order = ">") -> bytes:
    """An image with a UserComment in the Exif IFD or in IFD0."""
    field = {COMMENT: (kind, comment)}
    return with_exif(format, exif({}, field, order) if inner else exif(field, {}, order))


def xmp_packet(properties: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        f'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="Draw Things">{properties}'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def stealth(text: str, *, channels: int = 1, packed: bool = True) -> bytes:
    """A PNG that hides a text in the lowest bits, as NovelAI and the extension of the web UI do."""
    data = text.encode()
    data = gzip.compress(data, mtime=0) if packed else data
    mark = b"stealth_" + (b"png" if channels == 1 else b"rgb") + (b"comp" if packed else b"info")
    bits = np.unpackbits(np.frombuffer(mark + struct.pack(">I", 8 * len(data)) + data, dtype=np.uint8))
    height = 32
    width = max(8, -(-len(bits) // (height * channels)))
    plane = np.full(width * height * channels, 254, dtype=np.uint8)
    plane[: len(bits)] |= bits
    pixels = np.full((height, width, 4), 255, dtype=np.uint8)
    if channels == 1:
        pixels[..., 3] = plane.reshape(width, height).T
    else:
        pixels[..., :3] = plane.reshape(width, height, 3).transpose(1, 0, 2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


# texts


def quoted(value: Any) -> str:
    """As A1111 quotes a value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text


def a1111(prompt: str, negative: str, pairs: dict[str, Any], behind: str = "") -> str:
    line = ", ".join(key if key == value else f"{key}: {quoted(value)}" for key, value in pairs.items())
    return f"{prompt}{f'{chr(10)}Negative prompt: {negative}' if negative else ''}\n{line}".strip() + behind


def stable_diffusion_cpp(
    prompt: str, negative: str, *, seed: int, steps: int, scale: float, size: tuple[int, int]
) -> str:
    text = f"{prompt}\n" + (f"Negative prompt: {negative}\n" if negative else "")
    return text + (
        f"Steps: {steps}, CFG scale: {scale:f}, Skip layers: [7, 8, 9, ], Guidance: 3.500000, Eta: 0.000000, "
        f"Seed: {seed}, Size: {size[0]}x{size[1]}, Model: m.safetensors, RNG: cuda, Sampler: dpm++2m karras, "
        "TE: clip_l.safetensors, TE: t5xxl.safetensors, Version: stable-diffusion.cpp"
    )


def draw_things(prompt: str, negative: str, **more: Any) -> bytes:
    record = json.dumps({"c": prompt, "uc": negative, **more}, ensure_ascii=False)
    shown = f"{prompt}\n-{negative}\nSteps: 3, Sampler: Euler A, Guidance Scale: 6.5, Seed: 5, Size: 64x64"

    def listed(name: str, text: str) -> str:
        whole = escape(text, {"\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"})
        return f'<{name}><rdf:Alt><rdf:li xml:lang="x-default">{whole}</rdf:li></rdf:Alt></{name}>'

    return xmp_packet(listed("dc:description", shown) + listed("exif:UserComment", record))
