"""Reads what an image file says about how it was made: sdcli's record, or the record of another tool."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image, PngImagePlugin

from sdcli.errors import BadImage, UsageError
from sdcli.images.formats import ImageFormat
from sdcli.images.image_files import open_safely
from sdcli.metadata.a1111 import read_a1111
from sdcli.metadata.comfyui import read_comfyui, read_comfyui_workflow
from sdcli.metadata.invokeai import read_invokeai, read_old_invokeai
from sdcli.metadata.record import Record, parse_record
from sdcli.metadata.tool_record import Tool, ToolRecord
from sdcli.metadata.xmp import xmp_record
from sdcli.request.input_files import check_readable
from sdcli.request.schema import GenerationRequest

MAX_SHOWN = 500
"""Longer texts in `unmapped` are cut to this many characters."""
READERS: dict[str, Callable[[str], ToolRecord | None]] = {
    "parameters": read_a1111,
    "invokeai_metadata": read_invokeai,
    "sd-metadata": read_old_invokeai,
    "prompt": read_comfyui,
    "workflow": read_comfyui_workflow,
}
"""The key of a text in an image -> its reader; where an image has several, the first that parses counts."""
_FORMATS: dict[str, ImageFormat] = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}
"""By Pillow's names; MPO is a JPEG followed by a second image, as phones write them."""


@dataclass(frozen=True)
class ImageInfo:
    """What an image file says about itself. `width` and `height` are pixels as stored, before any EXIF rotation."""

    path: Path
    width: int
    height: int
    format: ImageFormat
    record: Record | None = None
    """sdcli's own record, exact."""
    parameters: str | None = None
    """A1111's text, as stored."""
    source: Literal["sdcli"] | Tool | None = None
    """The tool whose record `request` comes from."""
    request: GenerationRequest | None = None
    """The fields of the record that map to ours; None where none does."""
    unmapped: dict[str, Any] = field(default_factory=dict)
    """The rest of what was read, JSON-ready."""


def read_image(path: Path) -> ImageInfo:
    """Read the size, format and records of a PNG, JPEG or WebP file. Records are untrusted data.

    If sdcli's own record is damaged or newer, `unmapped["sdcli"]` holds the reason, and the other texts are read.
    Raises NotFound, and BadImage for a file that is truncated, too large, or of another format.
    """
    with image_and_info(path) as (_, info):
        return info


@contextlib.contextmanager
def image_and_info(path: Path) -> Iterator[tuple[Image.Image, ImageInfo]]:
    """Open and decode an image file: yield the image and its `read_image` info. Raises what `read_image` raises."""
    check_readable(path)
    try:
        with open_safely(path) as image:
            image.load()
            texts, own = _texts(image)
            format = _FORMATS[str(image.format)]
            info = ImageInfo(path, *image.size, format, parameters=texts.get("parameters"))
            yield image, _with_record(info, texts, own)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def read_tool_record(texts: Mapping[str, str]) -> ToolRecord | None:
    """The first record that can be parsed among an image's texts (by key), or None. Never raises."""
    for key, read in READERS.items():
        if key in texts and (found := read(texts[key])) is not None:
            return found
    return None


def _texts(image: Image.Image) -> tuple[dict[str, str], str | None]:
    """The texts in a decoded image by their key, and the text of sdcli's record."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        texts = {str(key): str(text) for key, text in image.text.items() if not key.startswith("XML:")}
        own = texts.pop("sdcli", None)
    else:
        texts, own = {}, xmp_record(image)
    for key, text in _exif_texts(image).items():
        texts.setdefault(key, text)
    return texts, own


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """A1111's comment, and ComfyUI's fields, which it writes as `key:{json}` into the camera's tags."""
    try:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        camera = [exif.get(tag) for tag in (ExifTags.Base.Model, ExifTags.Base.Make, ExifTags.Base.ImageDescription)]
    except Exception:  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        return {}
    texts = {}
    if isinstance(comment, bytes) and (text := _decoded_comment(comment)):
        texts["parameters"] = text
    for value in camera:
        if isinstance(value, str) and (match := re.match(r"(prompt|workflow):(?=\{)", value, re.IGNORECASE)):
            texts[match[1].lower()] = value[match.end() :].rstrip("\0")
    return texts


def _decoded_comment(comment: bytes) -> str:
    """An EXIF UserComment: 8 bytes name the encoding. Unicode has no fixed byte order; A1111's is big-endian."""
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return text.decode("utf-16", errors="replace")
        big, little = (text.decode(f"utf-16-{order}", errors="replace") for order in ("be", "le"))
        return little if "Steps: " in little and "Steps: " not in big else big
    plain = text if code in (b"ASCII\0\0\0", b"\0" * 8) else comment
    return plain.decode("utf-8", errors="replace").strip("\0 ")


def _with_record(info: ImageInfo, texts: dict[str, str], own: str | None) -> ImageInfo:
    """The image's info with the most exact of its records."""
    unmapped: dict[str, Any] = {}
    if own is not None:
        try:
            record = parse_record(own)
            return replace(info, record=record, source="sdcli", request=record.request)
        except UsageError as error:
            unmapped["sdcli"] = str(error)
    found = read_tool_record(texts)
    if found is not None:
        unmapped |= {key: _shown(value) for key, value in found.unmapped.items()}
        return replace(info, source=found.tool, request=found.request, unmapped=unmapped)
    return replace(info, unmapped=unmapped | {key: _shown(text) for key, text in texts.items()})


def _shown(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{value[:MAX_SHOWN]}... ({len(value):,} characters)"
    return value
