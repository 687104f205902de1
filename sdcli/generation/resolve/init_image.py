"""The start image of a request, as far as it shapes the request: which file it is, the size, how much is noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdcli.errors import UsageError
from sdcli.request.fields import FileRef
from sdcli.request.input_files import check_same_file, input_digest, read_input
from sdcli.request.schema import GenerationRequest, flag_of

STRENGTH, STRENGTH_BEHIND_MASK = 0.8, 1.0
"""The shares of noise that diffusers' pipelines have."""
MASK_BLUR = 4.0
LATENT_SUFFIXES = frozenset({".safetensors", ".latent", ".npy"})

Measure = Callable[[FileRef, int], tuple[int, int]]
"""(an image or latent file, pixels a side of a latent cell) -> its width and height in pixels."""


def start_filled(request: GenerationRequest, *, step: int, cell: int, measure: Measure | None) -> dict[str, Any]:
    """The fields that a start image decides, where the request leaves them open; sizes are multiples of `step`.

    `cell` is how many pixels a side a cell of the model's latents stands for.

    Raises UsageError for what does not go with it, and what reading the files raises.
    """
    if request.init_image is None:
        return {}
    if request.masked and is_latents(request.init_image):
        raise UsageError(f"{flag_of('mask' if request.mask else 'extend')} needs an image to start from, not latents")
    if request.masked and request.upscale is not None:
        raise UsageError("--upscale does not go with a mask or --extend: what is kept could not stay as it is")
    filled: dict[str, Any] = {"init_image": identified(request.init_image)}
    if request.mask is not None:
        if request.mask.path == "-" == request.init_image.path:
            raise UsageError("the start image and the mask cannot both be read from stdin")
        filled["mask"] = identified(request.mask)
    if request.masked and request.mask_blur is None:
        filled["mask_blur"] = MASK_BLUR
    if request.strength is None:
        filled["strength"] = STRENGTH_BEHIND_MASK if request.masked else STRENGTH
    if measure is not None:
        filled |= _size(request, measure(filled["init_image"], cell), step)
    return filled


def _size(request: GenerationRequest, own: tuple[int, int], step: int) -> dict[str, int]:
    """The image's own size, cut to multiples of `step`; with one side typed, the other keeps its proportions."""
    width, height = (side // step * step for side in own)
    if not width or not height:
        raise UsageError(f"{request.init_image}: is {own[0]}x{own[1]} pixels; at least {step}x{step} are needed")
    if request.extend is not None:
        extend = request.extend
        for side, pixels in extend:
            if pixels % step:
                raise UsageError(f"extend: {side} should be a multiple of {step}, not {pixels}")
        size = (width + extend.left + extend.right, height + extend.top + extend.bottom)
        typed = (request.width or size[0], request.height or size[1])
        if typed != size:
            asked = f"{typed[0]}x{typed[1]}"
            raise UsageError(f"--extend makes the picture {size[0]}x{size[1]}, and {asked} is asked for")
        return {"width": size[0], "height": size[1]}
    if is_latents(request.init_image) and (request.width or width, request.height or height) != (width, height):
        raise UsageError(f"{request.init_image} holds latents of an image of {width}x{height}; they keep their size")
    if request.width is None and request.height is not None:
        width = max(step, round(width * request.height / height / step) * step)
    elif request.height is None and request.width is not None:
        height = max(step, round(height * request.width / width / step) * step)
    return {"width": request.width or width, "height": request.height or height}


def is_latents(ref: FileRef | None) -> bool:
    """Whether a start file holds latents, by its suffix."""
    return ref is not None and Path(ref.path).suffix.lower() in LATENT_SUFFIXES


def identified(ref: FileRef) -> FileRef:
    """The reference with the digest of the file's bytes. Raises what `read_identified` raises."""
    digest = input_digest(ref.path)
    check_same_file(digest, ref.sha256, what=ref.path)
    return ref.model_copy(update={"sha256": digest})


def read_identified(ref: FileRef) -> bytes:
    """The bytes of a file, or of stdin for `-`.

    Raises NotFound, BadPicture for what is no ordinary file, and UsageError for another file than the reference says.
    """
    data = read_input(ref.path)
    check_same_file(hashlib.sha256(data).hexdigest(), ref.sha256, what=ref.path)
    return data
