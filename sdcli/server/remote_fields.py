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
from typing import Any

from sdcli.errors import SdcliError, UsageError
from sdcli.request.fields import ImageBytes, ImageInput
from sdcli.request.prompt_files import OWN
from sdcli.request.schema import canonical

NAME = re.compile(r"[\w .+@-]{1,200}")
"""What a name may consist of: no slash, backslash, colon or control character."""
_IMAGES = ("init_image", "mask")
_FILES_ONLY = {
    "ip_adapters": "IP-Adapters are files, which a remote request cannot name",
    "embeddings": "embeddings are files, which a remote request cannot name",
}


def remote_fields(fields: Mapping[str, Any], *, max_pixels: int) -> dict[str, Any]:
    """The fields of a request, with images decoded from base64. Raises UsageError that names the field."""
    own = {name: value for name, value in fields.items() if name in OWN}
    safe = dict(canonical({name: value for name, value in fields.items() if name not in OWN}))
    for name, sentence in _FILES_ONLY.items():
        if safe.get(name):
            raise UsageError(f"{name}: {sentence}")
    for name in ("model", "refiner"):
        if safe.get(name) is not None:
            _check_name(name, safe[name])
    for name in _IMAGES:
        if safe.get(name) is not None:
            safe[name] = image_in(safe[name], field=name, max_pixels=max_pixels)
    if safe.get("loras") is not None:
        safe["loras"] = [_lora(one) for one in _list("loras", safe["loras"])]
    if safe.get("controls") is not None:
        safe["controls"] = [_control(one, max_pixels) for one in _list("controls", safe["controls"])]
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


def upload_size(image: ImageInput, cell: int) -> tuple[int, int]:
    """Width and height in pixels of an uploaded image, upright. Raises UsageError."""
    from PIL import ImageOps

    from sdcli.images.image_files import open_safely

    assert isinstance(image, ImageBytes), "a remote request holds its images"
    assert image.data is not None, "a remote request holds its images"
    try:
        with open_safely(io.BytesIO(image.data)) as opened:
            return ImageOps.exif_transpose(opened).size
    except SdcliError as error:
        raise UsageError(f"init_image: {error}") from None


def _lora(value: Any) -> Any:
    path = value.partition(":")[0] if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
    _check_name("loras", path)
    return value


def _control(value: Any, max_pixels: int) -> Any:
    if not isinstance(value, dict):
        raise UsageError("controls: each should be an object with model and image")
    _check_name("controls.model", value.get("model"))
    return {**value, "image": image_in(value.get("image"), field="controls.image", max_pixels=max_pixels)}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{name}: should be a list")
    return value


def _check_name(field: str, value: Any) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value) or value.startswith("."):
        raise UsageError(f"{field}: should be a name that the server knows, never a path or an address")
