"""The image and the mask of img2img as the web UI means them: stretched, filled where they are generated anew.

Runs in a thread of the server's process, on images whose headers were checked before a pixel was decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sdcli.errors import SdcliError, UsageError
from sdcli.images.image_files import image_from_bytes, original_from_bytes
from sdcli.images.masks import alpha_of
from sdcli.request.fields import ImageBytes
from sdcli.server.a1111_fields import image_settings, refused
from sdcli.server.a1111_models import Img2Img
from sdcli.server.native import ApiError
from sdcli.server.remote_fields import as_upload, image_in
from sdcli.server.settings import ServerSettings

RADII = (256, 64, 16, 4)
"""Of the blurs that fill a masked part from around, in pixels, the coarse ones first."""

STEP = 64
"""Sizes are multiples of some number of pixels, which is at most this; what is left of an image's is cut off."""


def image_fields(body: Img2Img, server: ServerSettings) -> dict[str, Any]:
    """The image, the mask and their settings as fields of sdcli's request. Raises ApiError that names the field."""
    images = body.init_images or []
    if len(images) != 1:
        sentence = "Init image not found" if not images else f"one image at once is supported, not {len(images)}"
        raise refused("init_images", sentence, status=404 if not images else 400)
    fields, max_pixels = image_settings(body), server.max_upload_pixels
    try:
        upload = image_in(images[0], field="init_images", max_pixels=max_pixels)
        uploaded_mask = image_in(body.mask, field="mask", max_pixels=max_pixels) if body.mask else None
        image = image_from_bytes(upload.data or b"", name="init_images")
        mask = None if uploaded_mask is None else _mask(uploaded_mask, image.size, inverted=body.inpainting_mask_invert)
    except SdcliError as error:
        raise ApiError(400, "bad_request", str(error), param=str(error).partition(":")[0]) from None
    size = (body.width or image.width, body.height or image.height)
    if (size[0] // STEP * STEP) * (size[1] // STEP * STEP) > server.max_pixels:
        raise refused("width", f"{size[0]}x{size[1]} is more than {server.max_pixels} pixels")
    stretch = body.resize_mode in (None, 0) and size[0] * image.height != size[1] * image.width
    fill = mask is not None and body.inpainting_fill in (None, 0)
    if not stretch and not fill:
        return {**fields, "init_image": upload, **_as_png("mask", mask)}
    wanted = size if stretch else _covering(size, image.size)
    if wanted != image.size:  # before it is filled, which takes long in a large image
        image = image.resize(wanted, Image.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(wanted, Image.Resampling.NEAREST)
    if fill and mask is not None:
        image = filled(image, mask)
    return {**fields, **_as_png("init_image", image), **_as_png("mask", mask)}


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the colours from around in its masked part, by blurs that become finer towards its edge.

    `mask` is white where the image is filled. Each blur is a mean over the kept pixels alone; it counts by its share of
    them, so that the finest one that reaches a pixel decides.
    """
    kept = Image.fromarray(255 - np.asarray(mask))
    share = np.asarray(kept, dtype=np.float32)[..., None] / 255
    if not share.any():
        return image
    colours = np.asarray(image, dtype=np.float32)
    shown = Image.fromarray((colours * share).round().astype(np.uint8))
    result = np.broadcast_to((colours * share).sum((0, 1)) / share.sum(), colours.shape)
    for radius in RADII:
        blur = ImageFilter.GaussianBlur(radius)
        weight = np.asarray(kept.filter(blur), dtype=np.float32)[..., None] / 255
        mean = np.asarray(shown.filter(blur), dtype=np.float32) / np.maximum(weight, 1 / 255)
        near = np.minimum(1, 4 * weight)
        result = result * (1 - near) + np.minimum(mean, 255) * near
    return Image.fromarray(np.where(share > 0, colours, result).round().astype(np.uint8))


def _covering(size: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the proportions of an image that covers `size`, and is not larger than the image."""
    scale = min(1.0, max(size[0] / image[0], size[1] / image[1]))
    return round(image[0] * scale), round(image[1] * scale)


def _mask(upload: ImageBytes, size: tuple[int, int], *, inverted: bool | int | None) -> Image.Image:
    """A mask of that size, white where to generate. Of one with transparent parts, as the web UI's brush makes it, the
    opaque ones count.
    """
    image = original_from_bytes(upload.data or b"", name="mask")
    alpha = alpha_of(image)
    if alpha is not None and alpha.min() < 255:
        levels = alpha
    else:
        levels = np.asarray(image_from_bytes(upload.data or b"", name="mask").convert("L"))
    white = levels >= 128
    mask = Image.fromarray(np.where(~white if inverted else white, 255, 0).astype(np.uint8))
    if not mask.getbbox():
        raise UsageError("mask: selects nothing, so nothing would be generated")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)


def _as_png(field: str, image: Image.Image | None) -> dict[str, ImageBytes]:
    return {} if image is None else {field: as_upload(image)}
