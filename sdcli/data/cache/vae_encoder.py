"""A VAE's encoder for images of equal size, with fallbacks when memory or precision does not suffice."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sdcli.errors import OutOfMemory
from sdcli.io.lean_diffusers import VAE
from sdcli.io.out_of_memory import free_caches, out_of_memory
from sdcli.vae import autoencoder

Moments = tuple[Tensor, Tensor | None]
"""Mean and log variance of one image's latents, each [C, h, w]; no log variance for a VAE without a distribution."""


class VaeEncoder:
    """The VAE's encoder with its ways out: one by one, in tiles, and again in float32 where numbers went wrong."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._exact: VAE | None = None
        self._notes: dict[str, None] = {}
        self._told = 0

    def __call__(self, pixels: Sequence[Tensor]) -> list[Moments | None]:
        """Pixels [3, H, W] of equal size in 0..1 -> moments in the VAE's dtype; None for what is not finite."""
        dtype = next(self._vae.parameters()).dtype
        rows = self._rows(self._vae, pixels)
        stored: list[Moments | None] = [_in_dtype(row, dtype) for row in rows]
        if dtype != torch.float32:
            for place, row in enumerate(stored):
                if row is None:
                    self._note("some were encoded in float32: the numbers went wrong in half precision")
                    (exact,) = self._rows(self._in_float32(), pixels[place : place + 1])
                    stored[place] = _in_dtype(exact, dtype)
        return stored

    def notes(self) -> tuple[str, ...]:
        """What was not told yet; each is told once."""
        new = tuple(self._notes)[self._told :]
        self._told = len(self._notes)
        return new

    def _note(self, text: str) -> None:
        self._notes[text] = None

    def _in_float32(self) -> VAE:
        if self._exact is None:
            self._exact = copy.deepcopy(self._vae).float()
        return self._exact

    def _rows(self, vae: VAE, pixels: Sequence[Tensor]) -> list[Moments]:
        height, width = pixels[0].shape[1:]
        tiled = not autoencoder.fits_in_memory(vae, height, width)
        # a process that takes too much memory on the CPU is killed, not told
        if len(pixels) == 1 or autoencoder.fits_in_memory(vae, height * len(pixels), width):
            rows = self._try(vae, pixels, tiled=tiled)
            if rows is not None:
                if tiled:
                    self._note("some were encoded in tiles: the whole image would not fit into memory")
                return rows
            free_caches()
        if len(pixels) > 1:
            self._note(f"batches of {len(pixels)} were encoded in smaller ones: out of memory")
            half = len(pixels) // 2
            return self._rows(vae, pixels[:half]) + self._rows(vae, pixels[half:])
        rows = None if tiled else self._try(vae, pixels, tiled=True)
        if rows is None:
            raise OutOfMemory("out of memory while encoding one image, even in tiles; try a smaller --resolution")
        self._note("some were encoded in tiles: out of memory")
        return rows

    def _try(self, vae: VAE, pixels: Sequence[Tensor], *, tiled: bool) -> list[Moments] | None:
        try:
            # in the layout that diffusers' image processor gives, to which convolutions round bit for bit alike
            batch = torch.stack(list(pixels)).contiguous(memory_format=torch.channels_last)
            mean, logvar = autoencoder.moments(vae, batch, tiled=tiled)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        return [(mean[row], None if logvar is None else logvar[row]) for row in range(len(pixels))]


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments | None:
    """As they are stored; None where they are not finite there."""
    mean, logvar = (None if part is None else part.to(dtype) for part in moments)
    assert mean is not None
    finite = mean.isfinite().all() and (logvar is None or logvar.isfinite().all())
    return (mean, logvar) if finite else None
