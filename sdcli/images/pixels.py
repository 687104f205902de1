"""RGB images <-> pixel tensors, and an image cropped, padded or stretched to a size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdcli.errors import BadImage
from sdcli.images.formats import Fit

CELL = 8
"""Pixels per side of one latent cell of Stable Diffusion's VAEs."""


def fit(image: Image.Image, size: tuple[int, int] | None, *, how: Fit = "crop", cell: int = CELL) -> Image.Image:
    """The image at `size` (width, height): its middle cut out, padded with black, or stretched; Lanczos.

    Without a size nothing is resized: the middle is cropped to the nearest smaller multiples of `cell` pixels.
    Raises BadImage for an image smaller than one cell.
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
