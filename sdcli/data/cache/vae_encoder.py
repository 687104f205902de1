"""A VAE's encoder for images of equal size, with fallbacks when memory or precision does not suffice."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sdcli.io.lean_diffusers import VAE
from sdcli.vae.autoencoder import Moments
from sdcli.vae.encode import moments_with_fallbacks


class VaeEncoder:
    """A VAE's encoder with fallbacks: single images, tiles, and float32 if numbers are not finite."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._exact: VAE | None = None
        self._notes: dict[str, None] = {}
        self._reported = 0

    def __call__(self, pixels: Sequence[Tensor]) -> list[Moments | None]:
        """Pixels [3, H, W] of one size in 0..1 -> moments [C, h, w] in the VAE's dtype; None if they are not finite."""
        dtype = next(self._vae.parameters()).dtype
        rows = self._rows(self._vae, pixels)
        stored: list[Moments | None] = [_in_dtype(row, dtype) for row in rows]
        if dtype != torch.float32:
            for place, row in enumerate(stored):
                if row is None:
                    self._note("some images: encoded in float32, since in half precision the numbers were not finite")
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
        (mean, logvar), notes = moments_with_fallbacks(vae, pixels)
        for note in notes:
            self._note(f"some images: {note}")
        return [(mean[row], None if logvar is None else logvar[row]) for row in range(len(pixels))]


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments | None:
    """The moments in the stored dtype; None if they are not finite in it."""
    mean, logvar = (None if part is None else part.to(dtype) for part in moments)
    assert mean is not None
    finite = mean.isfinite().all() and (logvar is None or logvar.isfinite().all())
    return (mean, logvar) if finite else None
