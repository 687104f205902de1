"""Pixels -> the moments of their latents, with fallbacks where memory runs out: one by one, and in tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sdcli.io.lean_diffusers import VAE
from sdcli.io.out_of_memory import MemoryAttempt, first_that_fits
from sdcli.vae import autoencoder
from sdcli.vae.autoencoder import Moments


def moments_with_fallbacks(vae: VAE, pixels: Sequence[Tensor]) -> tuple[Moments, tuple[str, ...]]:
    """The `moments` of pixels [3, H, W] of equal size, and a note for each fallback: one by one, tiles.

    Raises OutOfMemory.
    """
    if len(pixels) > 1:
        height, width = pixels[0].shape[1:]
        # on the CPU, a process that takes too much memory is killed without an exception
        if autoencoder.fits_in_memory(vae, height * len(pixels), width):
            attempt = MemoryAttempt()
            with attempt:
                tiled, notes = _tiles_needed(vae, pixels)
                return _moments(vae, pixels, tiled=tiled), notes
            attempt.ran_out()
        singles = [moments_with_fallbacks(vae, [one]) for one in pixels]
        means, logvars = zip(*(found for found, _ in singles), strict=True)
        one_by_one = f"batch of {len(pixels)} encoded one by one: out of memory"
        notes = (one_by_one, *dict.fromkeys(note for _, its in singles for note in its))
        return (torch.cat(means), None if logvars[0] is None else torch.cat(logvars)), notes
    tiled, notes = _tiles_needed(vae, pixels)
    attempts: list[tuple[str | None, Callable[[], Moments]]] = [(None, partial(_moments, vae, pixels, tiled=tiled))]
    if not tiled:
        attempts.append(("encoded in tiles: out of memory", partial(_moments, vae, pixels, tiled=True)))
    too_large = (
        "out of memory while encoding a single image, even in tiles; try a smaller --size (in training --resolution)"
    )
    found, more = first_that_fits(attempts, otherwise=too_large)
    return found, (*notes, *more)


def _tiles_needed(vae: VAE, pixels: Sequence[Tensor]) -> tuple[bool, tuple[str, ...]]:
    tiled = not autoencoder.fits_in_memory(vae, *pixels[0].shape[1:])
    return tiled, ("encoded in tiles: the whole image would not fit into memory",) if tiled else ()


def _moments(vae: VAE, pixels: Sequence[Tensor], *, tiled: bool) -> Moments:
    # in the layout that diffusers' image processor gives, to which convolutions round bit for bit alike
    stacked = torch.stack(list(pixels)).contiguous(memory_format=torch.channels_last)
    return autoencoder.moments(vae, stacked, tiled=tiled)
