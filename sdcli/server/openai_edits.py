"""Images and masks of OpenAI's edits, whose transparent part is generated anew, as images and masks of sdcli."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from starlette.datastructures import FormData

from sdcli.errors import SdcliError, UsageError
from sdcli.request.fields import ImageBytes
from sdcli.server.native import ApiError
from sdcli.server.openai_models import EditForm
from sdcli.server.remote_fields import as_upload, checked_image


def check_repeated(form: FormData) -> None:
    """Raise ApiError for a field that comes several times, of which only the last one would count."""
    counts = Counter(name for name, _ in form.multi_items())
    for name, count in counts.items():
        if count > 1 and name not in ("image", "image[]"):
            raise ApiError(400, "bad_request", f"{name}: is given {count} times", param=name)


async def edit_fields(form: EditForm, *, max_pixels: int) -> dict[str, Any]:
    """The fields of sdcli's request for a form. Raises ApiError that names the field."""
    images = [*form.image, *form.image_list]
    if len(images) != 1:
        sentence = "image: is missing" if not images else f"image: one image can be edited at once, not {len(images)}"
        raise ApiError(400, "bad_request", sentence, param="image")
    image = await images[0].read()
    mask = None if form.mask is None else await form.mask.read()
    try:
        fields = await asyncio.to_thread(_images, image, mask, max_pixels)
    except UsageError as error:
        raise ApiError(400, "bad_request", str(error), param=str(error).partition(":")[0]) from None
    return {**form.fields(), **fields}


def _images(image: bytes, mask: bytes | None, max_pixels: int) -> dict[str, ImageBytes]:
    fields = {"init_image": checked_image(image, field="image", max_pixels=max_pixels)}
    if mask is not None:
        checked_image(mask, field="mask", max_pixels=max_pixels)
        fields["mask"] = white_where_transparent(mask)
    return fields


def white_where_transparent(mask: bytes) -> ImageBytes:
    """A mask that is white where it is transparent, which is generated anew, and black elsewhere.

    sdcli's own rule for masks with transparency asks what their colours are; here only the transparency counts. Raises
    UsageError for a mask without a transparent part.
    """
    import numpy as np
    from PIL import Image

    from sdcli.images.image_files import original_from_bytes
    from sdcli.images.masks import alpha_of

    try:
        alpha = alpha_of(original_from_bytes(mask, name="mask"))
    except SdcliError as error:
        raise UsageError(str(error)) from None
    transparent = None if alpha is None else alpha < 128
    if transparent is None or not transparent.any():
        raise UsageError("mask: has no transparent part; what is transparent in it is generated anew")
    return as_upload(Image.fromarray(np.where(transparent, 255, 0).astype(np.uint8)))
