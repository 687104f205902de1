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
    """A VAE's encoder with fallbacks: single images, tiles, and float32 if numbers are not finite."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._exact: VAE | None = None
        self._notes: dict[str, None] = {}
        self._reported = 0

    def __call__(self, pixels: Sequence[Tensor]) -> list[Moments | None]:
        """Pixels [3, H, W] of equal size in 0..1 -> moments in the VAE's dtype; None if they are not finite."""
        dtype = next(self._vae.parameters()).dtype
        rows = self._rows(self._vae, pixels)
        stored: list[Moments | None] = [_in_dtype(row, dtype) for row in rows]
        if dtype != torch.float32:
            for place, row in enumerate(stored):
                if row is None:
                    self._note("some were encoded in float32: in half precision the numbers were not finite")
                    (exact,) = self._rows(self._in_float32(), pixels[place : place + 1])
                    stored[place] = _in_dtype(exact, dtype)
        return stored

    def notes(self) -> tuple[str, ...]:
        """New messages; each is returned once."""
        new = tuple(self._notes)[self._reported :]
        self._reported = len(self._notes)
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
        # on the CPU, a process that takes too much memory is killed without an exception
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
            # the layout of diffusers' image processor, since convolutions round differently in others
            batch = torch.stack(list(pixels)).contiguous(memory_format=torch.channels_last)
            mean, logvar = autoencoder.moments(vae, batch, tiled=tiled)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        return [(mean[row], None if logvar is None else logvar[row]) for row in range(len(pixels))]


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments | None:
    """The moments in the stored dtype; None if they are not finite in it."""
    mean, logvar = (None if part is None else part.to(dtype) for part in moments)
    assert mean is not None
    finite = mean.isfinite().all() and (logvar is None or logvar.isfinite().all())
    return (mean, logvar) if finite else None
