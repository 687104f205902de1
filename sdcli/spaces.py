"""Where a model denoises, on the latents of a VAE or on the pixels themselves: the shape of x, its way to pixels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdcli import latents as latent_space
from sdcli.lean_imports import VAE
from sdcli.loading import LoadedModel


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a VAE, scaled to a standard deviation of about 1."""

    vae: VAE
    black_is_wrong: ClassVar[bool] = True
    """A picture that is black all over comes of a VAE that overflowed."""

    @property
    def dtype(self) -> torch.dtype:
        """What decoding computes in."""
        return next(self.vae.parameters()).dtype

    def shape(self, *, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of x for a picture of that many pixels."""
        cell = latent_space.cell(self.vae)
        return self.channels, height // cell, width // cell

    @property
    def channels(self) -> int:
        """C of x."""
        return latent_space.latent_channels(self.vae)

    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1 -> x [B, C, h, w], float32 on the CPU: a sample of what the VAE says."""
        tiled = not latent_space.fits_in_memory(self.vae, *pixels.shape[-2:])
        # one by one, so that none depends on its neighbours, and laid out as diffusers does, to round as it does
        rows = pixels.contiguous(memory_format=torch.channels_last).split(1)
        pairs = zip(rows, generators, strict=True)
        return torch.cat([latent_space.encode(self.vae, row, generators=[g], tiled=tiled) for row, g in pairs])

    def decode(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        """x [B, C, h, w] -> pixels [B, 3, H, W] in 0..1, float32 on the CPU; NaN stays NaN."""
        return latent_space.decode(self.vae, x, tiled=tiled)

    def fits_in_memory(self, x: Tensor) -> bool:
        """Whether decoding x [C, h, w] in one piece should fit into the free memory."""
        cell = latent_space.cell(self.vae)
        return latent_space.fits_in_memory(self.vae, x.shape[1] * cell, x.shape[2] * cell)

    def moved(self, **to: Any) -> LatentSpace:
        """The same with a copy of the VAE on another device or in another dtype."""
        return replace(self, vae=copy.deepcopy(self.vae).to(**to))


@dataclass(frozen=True)
class PixelSpace:
    """Pixels in -1..1, of one channel (grey) or three (RGB); Ho et al. 2020, arXiv 2006.11239."""

    channels: int
    black_is_wrong: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32

    def shape(self, *, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W): x is the picture."""
        return self.channels, height, width

    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1 -> x [B, 1 or 3, H, W]."""
        return torch.stack([in_pixel_space(picture, channels=self.channels) for picture in pixels])

    def decode(self, x: Tensor, *, tiled: bool = False) -> Tensor:
        """x [B, 1 or 3, H, W] -> pixels [B, 3, H, W] in 0..1, float32 on the CPU; NaN stays NaN."""
        pixels = (x.float().cpu() / 2 + 0.5).clamp(0, 1)
        return pixels.expand(-1, 3, -1, -1)

    def fits_in_memory(self, x: Tensor) -> bool:
        """Always: there is nothing to compute."""
        return True

    def moved(self, **to: Any) -> PixelSpace:
        """The same: there is nothing to move."""
        return self


Space = LatentSpace | PixelSpace


def in_pixel_space(pixels: Tensor, *, channels: int) -> Tensor:
    """Pixels [3, H, W] in 0..1 -> x_0 [C, H, W] in -1..1; grey (C = 1) is the mean of the channels."""
    chosen = pixels.mean(dim=0, keepdim=True) if channels == 1 else pixels
    return chosen * 2 - 1


def space_of(model: LoadedModel) -> Space:
    """The space that a model was trained in."""
    if model.spec.kind.space == "pixel":
        return PixelSpace(model.unet.config.in_channels)
    return LatentSpace(model.vae)
