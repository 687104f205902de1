"""The images that requests name, as tensors: init images with their masks, init latents, and ControlNets' maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from sdcli.errors import BadImage, UsageError
from sdcli.images.image_files import image_from_bytes, original_from_bytes
from sdcli.images.masks import mask_levels
from sdcli.images.pixels import fit, to_pixels
from sdcli.io.files import expanded
from sdcli.io.lean_diffusers import full_imports
from sdcli.request.fields import Extend, FileRef, ImageInput, Preprocessor
from sdcli.request.input_files import is_latents, pinned, read_pinned
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.latent_files import LatentFile, read_latents


@dataclass(frozen=True)
class InitImage:
    """The image that a request starts from. `pixels` [3, H, W] in 0..1."""

    pixels: Tensor
    mask: Tensor | None = None
    """[1, H, W], 1 where it is generated anew and 0 where it is kept; None where all of it is generated."""
    fade: Tensor | None = None
    """[1, H, W] in 0..1, the share of generated pixels in the finished image: 0 wherever the mask is."""
    notes: tuple[str, ...] = ()
    """What a user may not expect of the mask."""

    @cached_property
    def without_masked(self) -> Tensor:
        """The pixels, grey where they are generated anew."""
        return self.pixels if self.mask is None else torch.where(self.mask > 0, 0.5, self.pixels)

    def pasted(self, generated: Tensor) -> Tensor:
        """Generated pixels [3, H, W] with the kept part of the init image laid over them, exactly as it was."""
        return generated if self.fade is None else torch.lerp(self.pixels, generated, self.fade)


class InputImages:
    """Reads the image files of requests and keeps the last ones, so that a batch decodes each file once.

    An instance belongs to one pipeline. `read` returns the bytes of a file, or raises NotFound, BadImage or UsageError.
    """

    def __init__(self, read: Callable[[ImageInput], bytes] = read_pinned) -> None:
        self._read = read
        self._init_image = lru_cache(maxsize=16)(self._read_init_image)  # as many as an automatic batch has
        self.init_latents = lru_cache(maxsize=4)(read_init_latents)
        self.control_map = lru_cache(maxsize=16)(self._read_control_map)

    def init_image(self, request: ResolvedRequest) -> InitImage:
        """The init image of a resolved request. Raises NotFound, BadImage and UsageError for the files it names."""
        assert request.init_image is not None, "the request has no init image"
        return self._init_image(
            request.init_image,
            request.mask,
            extend=request.extend,
            inverted=bool(request.invert_mask),
            blur=request.mask_blur or 0,
            size=(request.width, request.height),
        )

    def _read_init_image(
        self,
        ref: ImageInput,
        mask: ImageInput | None,
        *,
        extend: Extend | None,
        inverted: bool,
        blur: float,
        size: tuple[int, int],
    ) -> InitImage:
        inner = size if extend is None else (size[0] - extend.left - extend.right, size[1] - extend.top - extend.bottom)
        image = self._open(ref)
        if mask is not None:
            white = fit(self._mask(mask, image), inner).convert("L").point(lambda level: 255 * (level >= 128))
            white = ImageChops.invert(white) if inverted else white
            notes = tuple(_mask_notes(white))
        else:
            white, notes = Image.new("L", inner, 0), ()
        pixels = to_pixels(fit(image, inner))
        if mask is None and extend is None:
            return InitImage(pixels)
        if extend is not None:
            border = ((extend.top, extend.bottom), (extend.left, extend.right))
            pixels = torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), *border), mode="edge"))
            white = Image.fromarray(np.pad(np.asarray(white), border, constant_values=255))
        hard = _levels(white)
        if not hard.any():
            colour, remedy = ("white", "without") if inverted else ("black", "with")
            raise UsageError(
                f"the mask is {colour} all over, so nothing would be generated; {remedy} --invert-mask all of it "
                "would be"
            )
        # half of the blurred edge lies in what is kept: the fade starts with the other half
        soft = (2 * _levels(white.filter(ImageFilter.GaussianBlur(blur))) - 1).clamp(0, 1) * hard if blur else hard
        return InitImage(pixels, hard, soft, notes)

    def _mask(self, ref: ImageInput, init: Image.Image) -> Image.Image:
        """White where to generate. Raises UsageError for another size than that of the init image."""
        mask = original_from_bytes(self._read(ref), name=str(ref))
        if mask.size != init.size:
            raise UsageError(f"the mask is {_shown(mask)} pixels, the init image {_shown(init)}; make them equal")
        try:
            return mask_levels(mask, init)
        except (BadImage, UsageError) as error:
            raise type(error)(f"the mask {ref} {error}") from None

    def _read_control_map(self, ref: ImageInput, preprocessor: Preprocessor, size: tuple[int, int]) -> Tensor:
        """[3, H, W] in 0..1."""
        with full_imports():
            from sdcli.images.preprocessors import control_map  # scipy takes 0.6 s

        return to_pixels(control_map(self._open(ref), preprocessor, size))

    def _open(self, ref: ImageInput) -> Image.Image:
        return image_from_bytes(self._read(ref), name=str(ref))


def measure(ref: ImageInput, cell: int) -> tuple[int, int]:
    """Width and height in pixels of an image, or of the image of latents [C, h, w] of cells of `cell` pixels.

    Raises what reading raises.
    """
    if is_latents(ref):
        _, height, width = read_init_latents(ref).latents[0].shape
        return width * cell, height * cell
    return image_from_bytes(read_pinned(ref), name=str(ref)).size


def read_init_latents(ref: FileRef) -> LatentFile:
    """The one latent in an init file. Raises NotFound, BadLatents and UsageError."""
    pinned(ref)
    try:
        file = read_latents(expanded(ref.path))
    except UsageError:
        raise UsageError(
            f"{ref.path} does not record how its latents are scaled; files of sdcli encode and ComfyUI do"
        ) from None
    if len(file.latents) != 1:
        raise UsageError(f"{ref.path} holds {len(file.latents)} latents; an init file holds one")
    return file


def _mask_notes(white: Image.Image) -> Iterator[str]:
    """Sentences about a mask, white where to generate, that is the same everywhere."""
    darkest, lightest = white.getextrema()
    if darkest:
        yield "the mask selects all of the init image, so nothing of it is kept"
    elif not lightest:
        yield "the mask selects nothing of the init image, so only what --extend adds is generated"


def _levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32))[None] / 255


def _shown(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
