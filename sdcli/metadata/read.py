"""Reads what an image file says about how it was made: sdcli's record, or the record of another tool."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from sdcli.errors import BadImage, UsageError
from sdcli.images.formats import ImageFormat
from sdcli.images.image_files import open_safely
from sdcli.metadata.a1111 import read_a1111, read_a1111_elsewhere
from sdcli.metadata.comfyui.record import read_comfyui, read_comfyui_workflow
from sdcli.metadata.draw_things import read_draw_things
from sdcli.metadata.easy_diffusion import read_easy_diffusion
from sdcli.metadata.fooocus import read_fooocus
from sdcli.metadata.image_texts import USER_COMMENT, XMP_COMMENT, ImageTexts, image_texts
from sdcli.metadata.invokeai import read_dream, read_invokeai, read_old_invokeai
from sdcli.metadata.novelai import read_novelai
from sdcli.metadata.record import Record, parse_record
from sdcli.metadata.swarmui import read_swarmui
from sdcli.metadata.tool_record import Tool, ToolRecord, json_object
from sdcli.request.input_files import check_readable
from sdcli.request.schema import GenerationRequest

MAX_SHOWN = 500
"""Longer texts in `unmapped` are cut to this many characters."""

Reader = Callable[[str], ToolRecord | None]


def read_wrapped_comfyui(text: str) -> ToolRecord | None:
    """Read `{"prompt": {...}, "workflow": {...}}`, both graphs of ComfyUI in one text. None for anything else."""
    record = json_object(text) or {}
    graphs = [(record.get("prompt"), read_comfyui), (record.get("workflow"), read_comfyui_workflow)]
    for graph, read in graphs:
        whole = graph if isinstance(graph, str) else json.dumps(graph)
        if (found := read(whole)) is not None:
            return found
    return None


_ANYWHERE = (
    USER_COMMENT,
    XMP_COMMENT,
    "ImageDescription",
    "XPComment",
    "comment",
    "Comment",
    "Model",
    "Make",
    "Description",
)
"""Places of any text, in which tools write their records, and other programs copy them."""
READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (("parameters", *_ANYWHERE), read_swarmui),
    (("parameters", *_ANYWHERE), read_fooocus),
    (("parameters",), read_a1111),
    (_ANYWHERE, read_a1111_elsewhere),
    (("invokeai_metadata",), read_invokeai),
    (("sd-metadata",), read_old_invokeai),
    (("Dream",), read_dream),
    (("prompt", *_ANYWHERE), read_comfyui),
    (("workflow", *_ANYWHERE), read_comfyui_workflow),
    (_ANYWHERE, read_wrapped_comfyui),
)
"""(places, reader) of records that are one text; where an image has several records, the first that parses counts."""
WHOLE_READERS: tuple[Callable[[Mapping[str, str]], ToolRecord | None], ...] = (
    read_draw_things,
    read_novelai,
    read_easy_diffusion,
)
"""Readers of records that are spread over several texts; they come first, for they are sure of their tool."""
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


def read_image_bytes(data: bytes, *, name: str) -> tuple[ImageInfo, dict[str, str]]:
    """Like `read_image`, for an image held in memory, such as an upload; and all its texts by their places.

    `name` is its name in error sentences.
    """
    with _opened(io.BytesIO(data), Path(name)) as (_, info, texts):
        return info, texts


@contextlib.contextmanager
def image_and_info(path: Path) -> Iterator[tuple[Image.Image, ImageInfo]]:
    """Open and decode an image file: yield the image and its `read_image` info. Raises what `read_image` raises."""
    check_readable(path)
    with _opened(path, path) as (image, info, _):
        yield image, info


@contextlib.contextmanager
def _opened(file: Path | io.BytesIO, path: Path) -> Iterator[tuple[Image.Image, ImageInfo, dict[str, str]]]:
    try:
        with open_safely(file) as image:
            image.load()
            found = image_texts(file, image)
            info = ImageInfo(path, *image.size, _FORMATS[str(image.format)])
            yield image, _with_record(info, found), found.texts
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def read_tool_record(texts: Mapping[str, str]) -> ToolRecord | None:
    """The first record that can be parsed among an image's texts (by place), or None. Never raises."""
    found = _first_record(texts)
    return None if found is None else found[1]


def _first_record(texts: Mapping[str, str]) -> tuple[str | None, ToolRecord] | None:
    """The first record and the place of its text; no place for one that is spread over several."""
    for read_whole in WHOLE_READERS:
        if (record := read_whole(texts)) is not None:
            return None, record
    for places, read in READERS:
        for place in places:
            if place in texts and (record := read(_without_label(texts[place]))) is not None:
                return place, record
    return None


def _without_label(text: str) -> str:
    """ComfyUI's nodes write `prompt:{json}` and `workflow:{json}` into EXIF fields."""
    match = re.match(r"(?:prompt|workflow):(?=\{)", text, re.IGNORECASE)
    return text[match.end() :] if match else text


def _with_record(info: ImageInfo, found: ImageTexts) -> ImageInfo:
    """The image's info with the most exact of its records."""
    unmapped: dict[str, Any] = {}
    texts = found.texts
    if found.own is not None:
        try:
            record = parse_record(found.own)
            text = texts.get("parameters", texts.get(USER_COMMENT))
            return replace(info, record=record, source="sdcli", request=record.request, parameters=text)
        except UsageError as error:
            unmapped["sdcli"] = str(error)
    first = _first_record(texts)
    unmapped |= found.unreadable
    if first is None:
        info = replace(info, parameters=texts.get("parameters"))
        return replace(info, unmapped=unmapped | {place: _shown(text) for place, text in texts.items()})
    place, tool_record = first
    unmapped |= {key: _shown(value) for key, value in tool_record.unmapped.items()}
    text = texts[place] if place is not None and tool_record.tool == "a1111" else texts.get("parameters")
    others = [name for name, other in texts.items() if name != place and other != text and name not in _SPREAD]
    if tool_record.tool == "comfyui":  # the same graph, as it was drawn
        others = [name for name in others if name != "workflow" and not texts[name].lower().startswith("workflow:")]
    if place is not None and others:
        unmapped["other texts"] = others
    return replace(info, source=tool_record.tool, request=tool_record.request, unmapped=unmapped, parameters=text)


_SPREAD = {"Software", "fooocus_scheme", "MakerNote", "XMP CreatorTool"}
"""Places that say which tool it was, and nothing more."""


def _shown(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{value[:MAX_SHOWN]}... ({len(value):,} characters)"
    return value
