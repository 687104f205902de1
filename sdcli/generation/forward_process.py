"""The forward process of a model on one image: encode it, add the noise of chosen timesteps, decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sdcli.diffusion.noise_schedule import NoiseSchedule, add_noise
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.errors import UsageError
from sdcli.generation.settings import RunSettings
from sdcli.images.pixels import fit, from_pixels
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, described
from sdcli.vae.autoencoder import draw_latents, generators_for, initial_noise
from sdcli.vae.decode import decode_with_fallbacks
from sdcli.vae.encode import moments_with_fallbacks
from sdcli.vae.latent_space import LatentSpace, PixelSpace, in_pixel_space

Notes = tuple[str, ...]
"""Fallbacks that a result needed, such as tiled decoding."""
Encode = Callable[[Tensor], tuple[Tensor, Notes]]
"""Pixels [3, H, W] in 0..1 -> x_0 [C, h, w], float32 on the CPU; with a VAE the mean of its distribution, scaled."""
Decode = Callable[[Tensor], tuple[Image.Image, Notes]]
"""x [C, h, w] -> an image."""


@dataclass(frozen=True)
class Level:
    """The noise level of one timestep."""

    t: int
    beta: float
    """The variance of the noise that this one step adds."""
    alpha_bar: float
    """The remaining share of the signal's variance."""
    snr_db: float
    """10 log10(alpha-bar / (1 - alpha-bar)), decibels; minus infinity if no signal is left."""


@dataclass(frozen=True, eq=False)
class ForwardProcess:
    """q(x_t | x_0) = N(sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I) of a model; Ho et al. 2020, eq. 4."""

    spec: ModelSpec
    schedule: NoiseSchedule
    betas: Tensor
    """float32 [T]"""
    encode: Encode
    decode: Decode

    @classmethod
    def of(cls, spec: ModelSpec, run: RunSettings) -> ForwardProcess:
        """Load what a model needs for it. Raises UsageError for flow matching, and what `load_model` raises."""
        spec = described(spec)
        spec.family.refuse("noise", spec.name)
        model, encode, decode = _in_pixels(spec, run) if spec.kind.space == "pixel" else _in_latents(spec, run)
        schedule = NoiseSchedule.from_config(model.scheduler_config)
        return cls(model.spec, schedule, make_scheduler("ddpm", model.scheduler_config).betas, encode, decode)

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    def fitted(self, image: Image.Image) -> Image.Image:
        """The middle of an RGB image, at the model's default size."""
        return fit(image, (self.spec.defaults.width, self.spec.defaults.height))

    def noised(self, x0: Tensor, timesteps: Sequence[int], *, seed: int) -> Tensor:
        """x_0 [C, h, w] -> x_t [N, C, h, w] with one noise for all: that of `generate` with this seed."""
        self.check(timesteps)
        noise = initial_noise(generators_for([seed]), (x0.shape[0], x0.shape[1], x0.shape[2]))
        shape = (len(timesteps), *x0.shape)
        return add_noise(self.schedule, x0.expand(shape), noise.expand(shape), torch.tensor(timesteps))

    def level(self, t: int) -> Level:
        """The noise level of timestep t."""
        alpha_bar = float(self.schedule.alphas_cumprod[t])
        snr = 10 * math.log10(alpha_bar / (1 - alpha_bar)) if alpha_bar else -math.inf
        return Level(t, float(self.betas[t]), alpha_bar, snr)

    def spread(self, count: int) -> list[int]:
        """`count` evenly spaced timesteps, including the first and the last. Raises UsageError for too many."""
        if not 1 <= count <= len(self):
            raise UsageError(f"{count} timesteps are too many: those of {self.spec.name} are 0 to {len(self) - 1}")
        return [round(number * (len(self) - 1) / max(1, count - 1)) for number in range(count)]

    def check(self, timesteps: Sequence[int]) -> None:
        """Raise UsageError for a number that is not a timestep of the model."""
        for t in timesteps:
            if not 0 <= t < len(self):
                raise UsageError(f"{t} is not a timestep of {self.spec.name}: they are 0 to {len(self) - 1}")


def _in_pixels(spec: ModelSpec, run: RunSettings) -> tuple[LoadedModel, Encode, Decode]:
    model = load_model(spec, device=run.device, dtype=run.dtype, offline=run.offline, parts=("unet",))
    channels = int(model.unet.config.in_channels)
    space = PixelSpace(channels)
    return (
        model,
        lambda pixels: (in_pixel_space(pixels, channels=channels), ()),
        lambda x: (from_pixels(space.decode(x[None])[0]), ()),
    )


def _in_latents(spec: ModelSpec, run: RunSettings) -> tuple[LoadedModel, Encode, Decode]:
    dtype = "float32" if run.dtype == "auto" else run.dtype  # precision matters more than speed here
    model = load_model(spec, device=run.device, dtype=dtype, offline=run.offline, parts=("vae",))
    space = LatentSpace(model.vae)

    def encode(pixels: Tensor) -> tuple[Tensor, Notes]:
        moments, notes = moments_with_fallbacks(model.vae, [pixels])
        return draw_latents(model.vae, moments)[0], notes

    def decode(x: Tensor) -> tuple[Image.Image, Notes]:
        pixels, notes = decode_with_fallbacks(space, x, may_be_black=True)
        return from_pixels(pixels), notes

    return model, encode, decode
