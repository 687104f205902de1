"""Functions on a diffusers VAE: moments, samples, decoding, scaling; and the initial noise of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdcli.io.devices import free_memory
from sdcli.io.lean_diffusers import VAE, AutoencoderTiny
from sdcli.vae.config import cell_of

TILE = 64
"""Latent cells per side of a tile (512 pixels with Stable Diffusion's VAE)."""

Moments = tuple[Tensor, Tensor | None]
"""Mean and log variance of latents, not scaled; see `moments`."""


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image: its noise depends on its seed alone, not on batch mates or device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise [B, *shape], float32 on the CPU, one draw per generator."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


@torch.inference_mode()
def moments(vae: VAE, pixels: Tensor, *, tiled: bool = False) -> Moments:
    """Pixels [B, 3, H, W] in 0..1 -> mean and log variance of their latents, each [B, C, H/8, W/8], not scaled.

    Both float32 on the CPU; the log variance is cut to -30..20, as diffusers' `DiagonalGaussianDistribution` does, and
    None for a VAE without a distribution (AutoencoderTiny).
    """
    parameter = next(vae.parameters())
    with _tiles(vae) if tiled else contextlib.nullcontext():
        encoded = vae.encode((pixels * 2 - 1).to(parameter))
    if isinstance(vae, AutoencoderTiny):
        return encoded.latents.float().cpu(), None
    return encoded.latent_dist.mean.float().cpu(), encoded.latent_dist.logvar.float().cpu()


@torch.inference_mode()
def draw_latents(vae: VAE, moments: Moments, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Moments -> scaled latents [B, C, H/8, W/8], float32 on the CPU.

    The mean of the VAE's distribution, or a sample drawn with one CPU generator per image. A VAE without a
    distribution (AutoencoderTiny) has only the mean; there the generators have no effect.
    """
    latents, logvar = moments
    if logvar is not None and generators is not None:
        # the exponential where and as the VAE computes: in half precision it rounds differently
        std = torch.exp(0.5 * logvar.to(next(vae.parameters()))).float().cpu()
        _, channels, height, width = latents.shape
        latents = latents + std * initial_noise(generators, (channels, height, width))
    return scale(vae, latents)


@torch.inference_mode()
def decode(vae: VAE, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Scaled latents [B, C, h, w] -> pixels [B, 3, 8h, 8w] in 0..1, float32 on the CPU; NaN stays NaN."""
    parameter = next(vae.parameters())
    with _tiles(vae) if tiled else contextlib.nullcontext():
        pixels = vae.decode(unscale(vae, latents).to(parameter), return_dict=False)[0]
    return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)


def scale(vae: VAE, latents: Tensor) -> Tensor:
    """The VAE's own latents -> the denoiser's: a mean of about 0 and a standard deviation of about 1."""
    return (latents - shift_factor(vae)) * scaling_factor(vae)


def unscale(vae: VAE, latents: Tensor) -> Tensor:
    """The inverse of `scale`."""
    return latents / scaling_factor(vae) + shift_factor(vae)


def scaling_factor(vae: VAE) -> float:
    """The factor on the VAE's own latents that makes their standard deviation about 1."""
    return float(vae.config.scaling_factor)


def shift_factor(vae: VAE) -> float:
    """The number subtracted from the VAE's own latents before scaling; 0 except for VAEs such as SD3's."""
    return float(vae.config.get("shift_factor") or 0)


def latent_channels(vae: VAE) -> int:
    """C of the VAE's latents [B, C, h, w]."""
    return int(vae.config.latent_channels)


def cell(vae: VAE) -> int:
    """Pixels per side of one latent cell; 8 for the VAE of Stable Diffusion."""
    return cell_of(vae.config)


def has_distribution(vae: VAE) -> bool:
    """Whether encoding gives a distribution to sample; AutoencoderTiny gives one latent per image."""
    return not isinstance(vae, AutoencoderTiny)


def fits_in_memory(vae: VAE, height: int, width: int) -> bool:
    """Whether decoding height x width pixels in one piece should fit into the free memory; encoding needs less.

    The widest layers hold about five buffers of `block_out_channels[1]` channels at full size
    (measured: 1.2 GB for 512x512 in float32).
    """
    parameter = next(vae.parameters())
    channels = vae.config.block_out_channels[1] if not isinstance(vae, AutoencoderTiny) else 64
    need = height * width * channels * parameter.element_size() * 5
    return need < 0.8 * free_memory(parameter.device)


@contextlib.contextmanager
def _tiles(vae: VAE, tile: int = TILE) -> Iterator[None]:
    """Make the VAE work in overlapping tiles of at most `tile` latent cells per side, inside the block."""
    settings = {"use_tiling": True, "tile_latent_min_size": tile, "tile_sample_min_size": tile * cell(vae)}
    if isinstance(vae, AutoencoderTiny):
        settings["spatial_scale_factor"] = cell(vae)  # diffusers 0.42 has 2 ** out_channels there, 8 for RGB images
    before = {name: getattr(vae, name) for name in settings}
    vars(vae).update(settings)
    try:
        yield
    finally:
        vars(vae).update(before)
