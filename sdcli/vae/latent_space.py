"""The space that a model denoises in, latents of a VAE or pixels: the shape of x, encoding and decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sdcli.io.lean_diffusers import VAE
from sdcli.vae import autoencoder
from sdcli.vae.encode import moments_with_fallbacks

Report = Callable[[str], None]
"""Receives a sentence for each fallback, used because memory ran out or numbers went wrong."""


def quiet(note: str) -> None:
    """A `Report` that drops its sentences."""


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a VAE, scaled to a standard deviation of about 1."""

    vae: VAE
    black_is_wrong: ClassVar[bool] = True
    """An image that is completely black means that the VAE overflowed."""
    _moments: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, init=False, repr=False, compare=False
    )
    """Moments and notes of encoded pixels, kept as long as the caller keeps the pixels."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that decoding computes in."""
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that decoding computes on."""
        return next(self.vae.parameters()).device

    def shape(self, *, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of x for an image of that many pixels."""
        cell = autoencoder.cell(self.vae)
        return self.channels, height // cell, width // cell

    @property
    def channels(self) -> int:
        """C of x."""
        return autoencoder.latent_channels(self.vae)

    @property
    def draws(self) -> bool:
        """Whether encoding draws from the generators."""
        return autoencoder.has_distribution(self.vae)

    def encode(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator], *, report: Report = quiet
    ) -> Tensor:
        """Pixels [3, H, W] in 0..1, of equal size -> samples x [B, C, h, w] of the VAE, float32 on the CPU.

        Images are encoded one by one, so that none depends on its batch mates; the moments of a pixel tensor that was
        encoded before are reused. `report` receives notes about fallbacks. Raises OutOfMemory.
        """
        rows = []
        for one, generator in zip(pixels, generators, strict=True):
            if one not in self._moments:
                self._moments[one] = moments_with_fallbacks(self.vae, [one])
            moments, notes = self._moments[one]
            for note in notes:
                report(note)
            rows.append(autoencoder.draw_latents(self.vae, moments, [generator]))
        return torch.cat(rows)

    def decode(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        """x [B, C, h, w] -> pixels [B, 3, H, W] in 0..1, float32 on the CPU; NaN stays NaN."""
        return autoencoder.decode(self.vae, x, tiled=tiled)

    def fits_in_memory(self, x: Tensor) -> bool:
        """Whether decoding x [C, h, w] in one piece should fit into the free memory."""
        cell = autoencoder.cell(self.vae)
        return autoencoder.fits_in_memory(self.vae, x.shape[1] * cell, x.shape[2] * cell)

    def moved(self, **to: Any) -> LatentSpace:
        """The same space with a copy of the VAE on another device or in another dtype."""
        return replace(self, vae=copy.deepcopy(self.vae).to(**to))


@dataclass(frozen=True)
class PixelSpace:
    """Pixels in -1..1, of one channel (grey) or three (RGB); Ho et al. 2020, arXiv 2006.11239."""

    channels: int
    black_is_wrong: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32
    device: ClassVar[torch.device] = torch.device("cpu")

    def shape(self, *, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W): x is the image."""
        return self.channels, height, width

    def encode(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator], *, report: Report = quiet
    ) -> Tensor:
        """Pixels [3, H, W] in 0..1 -> x [B, 1 or 3, H, W]."""
        return torch.stack([in_pixel_space(image, channels=self.channels) for image in pixels])

    def decode(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        """x [B, 1 or 3, H, W] -> pixels [B, 3, H, W] in 0..1, float32 on the CPU; NaN stays NaN."""
        pixels = (x.float().cpu() / 2 + 0.5).clamp(0, 1)
        return pixels.expand(-1, 3, -1, -1)

    def fits_in_memory(self, x: Tensor) -> bool:
        """Always: there is nothing to compute."""
        return True

    def moved(self, **to: Any) -> PixelSpace:
        """The same space: there is nothing to move."""
        return self


Space = LatentSpace | PixelSpace


def in_pixel_space(pixels: Tensor, *, channels: int) -> Tensor:
    """Pixels [3, H, W] in 0..1 -> x_0 [C, H, W] in -1..1; grey (C = 1) is the mean of the channels."""
    chosen = pixels.mean(dim=0, keepdim=True) if channels == 1 else pixels
    return chosen * 2 - 1
