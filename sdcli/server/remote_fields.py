"""Request fields that come over the network: images are in the body, everything else is named, and no field is a path.

A remote request can use the models, LoRAs and ControlNets that the operator has given names to. It can never make the
server open a file, a folder or an address of its choice.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sdcli.errors import NotFound, SdcliError, UsageError
from sdcli.models.adapter_files import is_in_folder
from sdcli.models.registry import Registry
from sdcli.request.fields import EmbeddingRef, ImageBytes, ImageInput, LoraRef
from sdcli.request.lora_tags import read_tags
from sdcli.request.prompt_files import OWN
from sdcli.request.schema import canonical, did_you_mean
from sdcli.server.settings import ServerSettings

if TYPE_CHECKING:
    from PIL import Image

MAX_TEXT = 32_000
"""Characters of a prompt, which is OpenAI's limit, too: the text encoders take minutes for megabytes of text."""
MAX_PARTS = 64
"""Parts of a prompt, joined by AND, each of which is a pass of its own in every step."""
MAX_NAME = 255
"""Characters of a name, as of the name of a file."""
MAX_CUSTOM_ID = 200
_PATH = re.compile(r"\.|[^/\\\0]*[/\\\0]|[A-Za-z][A-Za-z0-9+.-]*:")
"""How a path or an address begins: with a dot, with a part before a slash, or with a scheme or drive."""
_IMAGES = ("init_image", "mask")
_TEXTS = ("prompt", "negative_prompt", "prompt_template")


@dataclass(frozen=True)
class Allowed:
    """What the operator lets requests use, and how large their images may be."""

    models: Mapping[str, Any]
    controlnets: Mapping[str, Any]
    lora_dir: Path | None
    embeddings: Mapping[str, EmbeddingRef]
    """By their words."""
    max_pixels: int

    @classmethod
    def of(cls, registry: Registry, settings: ServerSettings) -> Allowed:
        embeddings = {one.word: one for one in settings.embeddings}
        return cls(registry.models, registry.controlnets, settings.run.lora_dir, embeddings, settings.max_upload_pixels)


def remote_fields(fields: Mapping[str, Any], *, allowed: Allowed) -> dict[str, Any]:
    """The fields of a request, with images decoded from base64, and everything else that is named known.

    Raises UsageError that names the field, and NotFound for a name that is not known.
    """
    own = {name: value for name, value in fields.items() if name in OWN}
    if own.get("custom_id") is not None:
        _check_custom_id(own["custom_id"])
    safe = dict(canonical({name: value for name, value in fields.items() if name not in OWN}))
    if safe.get("ip_adapters"):
        raise UsageError("ip_adapters: IP-Adapters are files, which a remote request cannot name")
    _check_lengths(safe)
    for name in ("model", "refiner"):
        if safe.get(name) is not None:
            _check_name(name, safe[name], allowed.models, "model")
    for name in _IMAGES:
        if safe.get(name) is not None:
            safe[name] = image_in(safe[name], field=name, max_pixels=allowed.max_pixels)
    if safe.get("embeddings"):
        safe["embeddings"] = [_embedding(one, allowed.embeddings) for one in _list("embeddings", safe["embeddings"])]
    for name in ("prompt", "prompt_template"):
        if isinstance(safe.get(name), str):
            for ref in read_tags(safe[name]).loras:
                _check_lora(name, ref, allowed.lora_dir)
    if safe.get("loras") is not None:
        safe["loras"] = [_lora(one, allowed.lora_dir) for one in _list("loras", safe["loras"])]
    if safe.get("controls") is not None:
        safe["controls"] = [_control(one, allowed) for one in _list("controls", safe["controls"])]
    return {**safe, **own}


def image_in(value: Any, *, field: str, max_pixels: int) -> ImageBytes:
    """An image as base64 text, with or without `data:image/...;base64,` before it. Raises UsageError.

    Its size is read from its header before a pixel is decoded.
    """
    if isinstance(value, ImageBytes):  # an upload that was checked; JSON has no such value
        return value
    if not isinstance(value, str):
        raise UsageError(f"{field}: should be an image as base64 text")
    text = value.partition(",")[2] if value.startswith("data:image/") else value
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{field}: should be an image as base64 text, never a path or an address") from None
    return checked_image(data, field=field, max_pixels=max_pixels)


def checked_image(data: bytes, *, field: str, max_pixels: int) -> ImageBytes:
    """The bytes of an uploaded image, whose header says that it is small enough. Raises UsageError."""
    from sdcli.images.image_files import open_safely

    try:
        with open_safely(io.BytesIO(data)) as image:
            width, height = image.size
    except SdcliError as error:
        raise UsageError(f"{field}: {error}") from None
    if width * height > max_pixels:
        raise UsageError(f"{field}: {width}x{height} is more than {max_pixels} pixels")
    return ImageBytes.model_validate(data)


def as_upload(image: Image.Image) -> ImageBytes:
    """An image that was computed from an upload, as if it had been uploaded."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return ImageBytes.model_validate(file.getvalue())


def upload_size(image: ImageInput, cell: int) -> tuple[int, int]:
    """Width and height in pixels of an uploaded image, upright. Raises UsageError."""
    from PIL import ImageOps

    from sdcli.images.image_files import open_safely

    assert isinstance(image, ImageBytes), "a remote request holds its images"
    assert image.data is not None
    try:
        with open_safely(io.BytesIO(image.data)) as opened:
            return ImageOps.exif_transpose(opened).size
    except SdcliError as error:
        raise UsageError(f"init_image: {error}") from None


def _check_custom_id(value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    text = isinstance(value, str) and len(value) <= MAX_CUSTOM_ID and value.isprintable()
    if not (whole and abs(value) < 2**63) and not text:
        raise UsageError(f"custom_id: should be a line of at most {MAX_CUSTOM_ID} characters, or a whole number")


def _check_lengths(fields: Mapping[str, Any]) -> None:
    """Raise UsageError for a text that is too long, or becomes so inside its template."""
    texts = {name: text for name in _TEXTS if isinstance(text := fields.get(name), str)}
    for name, text in texts.items():
        if len(text) > MAX_TEXT:
            raise UsageError(f"{name}: has {len(text):,} characters; at most {MAX_TEXT:,} are taken")
    prompt, template = texts.get("prompt", ""), texts.get("prompt_template", "")
    joined = prompt.count("AND") + 1  # each part of an AND has a template of its own
    if joined > MAX_PARTS:
        raise UsageError(f"prompt: has {joined:,} parts that AND joins; at most {MAX_PARTS} are taken")
    if joined * len(template) + template.count("{prompt}") * len(prompt) > 2 * MAX_TEXT:
        raise UsageError(f"prompt_template: with the prompt in it, it has more than {2 * MAX_TEXT:,} characters")


def _lora(value: Any, folder: Path | None) -> Any:
    try:
        ref = LoraRef.model_validate(LoraRef.pieces(value) if isinstance(value, str) else value)
    except (ValidationError, UsageError):
        raise UsageError("loras: each should be NAME, NAME:WEIGHT, or an object with path and weight") from None
    _check_lora("loras", ref, folder)
    return value


def _check_lora(field: str, ref: LoraRef, folder: Path | None) -> None:
    """Raise NotFound for a name that the LoRA folder does not have, whatever it means elsewhere on the disk."""
    _check_word(field, ref.path)
    if not is_in_folder(ref, folder):
        raise NotFound(f"{field}: no LoRA {ref.path!r} here")


def _embedding(value: Any, known: Mapping[str, EmbeddingRef]) -> EmbeddingRef:
    _check_name("embeddings", value, known, "embedding")
    return known[value]


def _control(value: Any, allowed: Allowed) -> Any:
    if not isinstance(value, dict):
        raise UsageError("controls: each should be an object with model and image")
    _check_name("controls.model", value.get("model"), allowed.controlnets, "ControlNet")
    return {**value, "image": image_in(value.get("image"), field="controls.image", max_pixels=allowed.max_pixels)}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{name}: should be a list")
    return value


def _check_name(field: str, value: Any, known: Mapping[str, Any], kind: str) -> None:
    """Raise UsageError for what is no name, and NotFound for one that the operator did not give."""
    if isinstance(value, str) and value in known:
        return
    _check_word(field, value)
    raise NotFound(f"{field}: no {kind} {value!r} here{did_you_mean(value, known)}")


def _check_word(field: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_NAME or _PATH.match(value):
        raise UsageError(f"{field}: should be a name that the server knows, never a path or an address")
