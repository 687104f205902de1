"""A model's VAE alone, at work on its own unscaled latents: the form in which files hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from sdcli.generation.settings import RunSettings
from sdcli.images.pixels import from_pixels
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec
from sdcli.vae import autoencoder
from sdcli.vae.decode import decode_with_fallbacks
from sdcli.vae.encode import moments_with_fallbacks
from sdcli.vae.latent_space import LatentSpace


@dataclass(frozen=True)
class LoadedVae:
    """The VAE of a model, whose own scaling is switched off; `scaling_factor` and `shift_factor` are the model's."""

    model: LoadedModel
    scaling_factor: float
    shift_factor: float

    @classmethod
    def load(cls, spec: ModelSpec, run: RunSettings) -> LoadedVae:
        """Load the VAE of a model; `auto` computes in float32, since what is encoded should survive the round trip."""
        dtype = "float32" if run.dtype == "auto" else run.dtype
        options: dict[str, Any] = {"device": run.device, "dtype": dtype, "offline": run.offline}
        model = load_model(spec, parts=("vae",), large_buffers=True, **options)
        factor, shift = autoencoder.scaling_factor(model.vae), autoencoder.shift_factor(model.vae)
        # nothing is multiplied, so nothing is rounded
        model.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        return cls(model, factor, shift)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def dtype(self) -> str:
        """The dtype that the VAE computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def cell(self) -> int:
        """Pixels a side that become one cell of the latents."""
        return autoencoder.cell(self.model.vae)

    @property
    def channels(self) -> int:
        """C of the latents."""
        return autoencoder.latent_channels(self.model.vae)

    @property
    def has_distribution(self) -> bool:
        """Whether there are samples to draw, or only a mean."""
        return autoencoder.has_distribution(self.model.vae)

    @cached_property
    def identity(self) -> str:
        """Which weights the VAE has; see `LoadedModel.identity`."""
        return self.model.identity("vae")

    def encode(self, pixels: Sequence[Tensor], *, seeds: Sequence[int] | None) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels [3, H, W] of equal size -> unscaled latents [B, C, H/cell, W/cell], float32, and notes on fallbacks.

        The mean, or a sample with one seed per image. Raises OutOfMemory.
        """
        moments, notes = moments_with_fallbacks(self.model.vae, pixels)
        generators = None if seeds is None else autoencoder.generators_for(seeds)
        return autoencoder.draw_latents(self.model.vae, moments, generators), notes

    def decode(self, latents: Tensor, *, tiled: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
        """Unscaled latents [C, h, w] -> an image, and notes on fallbacks. Raises OutOfMemory and BadOutput."""
        space, on_device = LatentSpace(self.model.vae), latents.to(self.model.device)
        pixels, notes = decode_with_fallbacks(space, on_device, tiled=tiled, may_be_black=True)
        return from_pixels(pixels), notes
