"""Latents -> pixels, with fallbacks: tiles, the CPU and float32 where memory runs out or the numbers go wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdcli.errors import BadOutput
from sdcli.io.out_of_memory import first_that_fits
from sdcli.vae.latent_space import Space


def decode_with_fallbacks(
    space: Space, latents: Tensor, *, tiled: bool = False, may_be_black: bool = False
) -> tuple[Tensor, tuple[str, ...]]:
    """Latents [C, h, w] -> pixels [3, H, W], and a note for each fallback: tiles, the CPU, float32.

    With `tiled` it begins with tiles. A black image from a VAE counts as a failure, unless it `may_be_black`: then
    only NaN does. The latents are kept through every attempt. Raises OutOfMemory and BadOutput.
    """
    if not latents.isfinite().all():
        raise BadOutput("the latents are not finite (NaN); try --dtype float32")
    may_be_black = may_be_black or not space.black_is_wrong
    whole_fits = tiled or space.fits_in_memory(latents)
    attempts: list[tuple[str | None, Callable[[], Tensor]]] = []
    if tiled or not whole_fits:
        note = None if tiled else "decoded in tiles: the whole image would not fit into memory"
        attempts.append((note, partial(_decoded, space, latents, tiled=True)))
    else:
        attempts.append((None, partial(_decoded, space, latents, tiled=False)))
        attempts.append(("decoded in tiles: out of memory", partial(_decoded, space, latents, tiled=True)))
    if space.device.type != "cpu":
        on_cpu = "decoded on the CPU: out of memory"
        attempts.append((on_cpu, lambda: _decoded(space.moved(device="cpu"), latents.cpu(), tiled=True)))
    too_large = "out of memory while decoding, even in tiles; try a smaller --size"
    pixels, notes = first_that_fits(attempts, otherwise=too_large)
    if is_bad_image(pixels, may_be_black=may_be_black) and space.dtype != torch.float32:
        notes = (*notes, "decoded in float32: the half-precision VAE gave no image")
        precise = partial(_decoded, space.moved(dtype=torch.float32), latents, tiled=tiled or not whole_fits)
        pixels, _ = first_that_fits([(None, precise)], otherwise="out of memory while decoding in float32")
    if is_bad_image(pixels, may_be_black=may_be_black):
        kind = "NaN" if not pixels.isfinite().all() else "all black"
        raise BadOutput(f"the decoded image is {kind}; nothing was saved")
    return pixels, notes


def is_bad_image(pixels: Tensor, *, may_be_black: bool = False) -> bool:
    """Whether decoded pixels are not an image: NaN somewhere, or black everywhere."""
    return not bool(pixels.isfinite().all()) or (float(pixels.max()) == 0.0 and not may_be_black)


def _decoded(space: Space, latents: Tensor, *, tiled: bool) -> Tensor:
    return space.decode(latents[None], tiled=tiled)[0]
