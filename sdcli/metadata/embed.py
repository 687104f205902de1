"""Writes image files, with sdcli's record and A1111's text in them.

Where the two texts are stored, so that other tools find what they know and any metadata viewer finds the rest:

            A1111's `parameters`              sdcli's record (JSON in ASCII, exact)
    PNG     text chunk `parameters`           text chunk `sdcli`
    JPEG    EXIF UserComment, UTF-16          XMP property `sdcli:record`, in Extended XMP when it needs over 64 KB
    WebP    EXIF UserComment, UTF-16          XMP property `sdcli:record`

A JPEG's EXIF holds 64 KB at most: a `parameters` text over some 32,000 characters is left out, the record is not.
"""

from __future__ import annotations

import io
import re
import struct
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from sdcli import __version__
from sdcli.images.formats import ImageFormat
from sdcli.metadata.a1111 import a1111_text
from sdcli.metadata.record import Record, record_json
from sdcli.metadata.text_bytes import plain_text
from sdcli.metadata.xmp import MAX_SEGMENT, jpeg_segments, xmp_packet


def image_bytes(image: Image.Image, format: ImageFormat, record: Record | None, *, quality: int | None = None) -> bytes:
    """Encode an image (any mode, stored as RGB) as a file; equal arguments give equal bytes.

    PNG uses the fastest compression level, JPEG full colour resolution, WebP its lossy form; `quality` (default 95) is
    that of JPEG and WebP, 0 to 100.
    Without a record only pixels are written, whatever `image.info` holds.
    """
    pixels = image.convert("RGB")
    # A new image of the same pixels: Pillow would write what the old one's `info` carries (comment, profile, dpi).
    clean = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    options = _encoding(format, quality) | (_embedded(record, format) if record is not None else {})
    file = io.BytesIO()
    clean.save(file, format=format, **options)
    return file.getvalue()


def parameters_text(record: Record) -> str:
    """A1111's text for a record; its model hash is that of the single file, or else of the UNet."""
    weights = record.provenance.get("weights") or {}
    digest = weights.get("checkpoint", weights.get("unet", "")) if isinstance(weights, dict) else ""
    match = re.fullmatch(r"sha256:([0-9a-f]{10})[0-9a-f]{54}", str(digest))
    return a1111_text(
        record.request, version=__version__, model_hash=match[1] if match else None, lora_hashes=_lora_hashes(record)
    )


def _lora_hashes(record: Record) -> dict[str, str]:
    """LoRA name -> the first 12 digits of its hash, as the web UI writes them; empty for provenance of another form."""
    loras = record.provenance.get("loras")
    return {
        str(one.get("name")): str(one.get("tensors_sha256"))[:12]
        for one in (loras if isinstance(loras, list) else [])
        if isinstance(one, dict)
    }


def _encoding(format: ImageFormat, quality: int | None) -> dict[str, Any]:
    quality = 95 if quality is None else quality
    match format:
        case "png":
            return {"compress_level": 1}
        case "jpeg":
            return {"quality": max(1, quality), "subsampling": 0}
        case "webp":
            return {"quality": quality, "method": 4}


def _embedded(record: Record, format: ImageFormat) -> dict[str, Any]:
    """Pillow's options that store both texts in a file."""
    parameters, own = parameters_text(record), record_json(record)
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        if _is_certain(parameters):
            chunks.add_text("parameters", parameters)  # tEXt, or iTXt where the text is not Latin-1
        else:
            chunks.add_itxt("parameters", parameters)
        chunks.add_text("sdcli", own)
        return {"pnginfo": chunks}
    exif = _user_comment(parameters)
    if format == "webp":
        return {"exif": exif, "xmp": xmp_packet(own)}
    return {"extra": jpeg_segments(own), **({"exif": exif} if len(exif) <= MAX_SEGMENT else {})}


def _is_certain(text: str) -> bool:
    """Whether a text can only be read as itself where it stands as Latin-1."""
    try:
        return plain_text(text.encode("latin-1")) == text
    except UnicodeEncodeError:
        return True


def _user_comment(text: str) -> bytes:
    """EXIF with the UserComment tag alone, big-endian as A1111 writes it.

    Built here because Pillow writes the tag as BYTE, on which A1111's reader fails; the standard's type is UNDEFINED.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, ExifTags.IFD.Exif, _LONG, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, _UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + first + second + comment


_LONG, _UNDEFINED = 4, 7
"""TIFF field types."""
