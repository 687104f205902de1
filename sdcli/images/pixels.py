"""Image files -> RGB images -> pixels and back; and an image fitted to a size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdcli.errors import BadImage, SdcliError
from sdcli.images.image_files import OWN_FORMATS, opened
from sdcli.request.input_files import MAX_FILE_BYTES, check_readable

Fit = Literal["crop", "pad", "stretch"]
READABLE = (*OWN_FORMATS, "BMP", "GIF", "TIFF")
"""Pillow's names of the formats that are read; the others have a long history of holes."""
CELL = 8
"""Pixels a side that become one cell of the latents of Stable Diffusion's VAEs."""


def open_image(path: Path) -> Image.Image:
    """An image file -> its first frame as RGB, upright, transparent parts on white, decoded whole.

    Raises NotFound, and BadPicture for what is truncated, damaged, too large, or no image.
    """
    check_readable(path)
    return _decoded(path, name=str(path))


def image_from_bytes(data: bytes, *, name: str) -> Image.Image:
    """The bytes of an image file -> the image, with the care of `open_image`; `name` is for the sentence.

    Raises BadPicture.
    """
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"{name}: is larger than {MAX_FILE_BYTES // 1024**2} MiB, which no image here is")
    return _decoded(io.BytesIO(data), name=name)


def _decoded(file: Path | io.BytesIO, *, name: str) -> Image.Image:
    try:
        with opened(file, formats=READABLE) as image:
            image.load()
            return as_shown(image)
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from None


def as_shown(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, upright, transparent parts on white; the given one stays as it is."""
    return _rgb(_upright(image))


def fit(image: Image.Image, size: tuple[int, int] | None, *, how: Fit = "crop", cell: int = CELL) -> Image.Image:
    """The image at `size` (width, height): its middle cut out, padded with black, or stretched; Lanczos.

    Without a size nothing is resized: the middle is cut out at the nearest smaller multiples of a cell, in pixels.
    Raises BadPicture for one that is smaller than a cell.
    """
    if size is None:
        width, height = (side // cell * cell for side in image.size)
        if not width or not height:
            raise BadImage(f"is {image.width}x{image.height} pixels; at least {cell}x{cell} are needed")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    match how:
        case "crop":
            return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
        case "pad":
            return ImageOps.pad(image, size, method=Image.Resampling.LANCZOS, color="black")
        case "stretch":
            return image.resize(size, Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> pixels [3, H, W], float32 in 0..1."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255


def from_pixels(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in 0..1 -> an RGB image, rounded as diffusers' VaeImageProcessor does."""
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except SdcliError:
        raise
    except Exception:  # damaged EXIF is no reason to refuse the image, and fails in a dozen ways
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB. 16 bits a channel become 8 by their range, not by cutting them off."""
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("holds floating-point numbers, whose black and white are not known")
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    return image.convert("RGB")
