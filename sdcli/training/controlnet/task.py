"""`sdcli train-controlnet`: train a copy of a UNet's first half to guide the UNet by a map.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdcli.errors import UsageError
from sdcli.io.lean_diffusers import ControlNetModel
from sdcli.models.loaded_model import LoadedModel
from sdcli.training.task import Batch, Networks
from sdcli.training.unet.task import UnetTask
from sdcli.vae.autoencoder import cell

EMBEDDING_WIDTHS = (16, 32, 96, 256)
"""Channels of the layers that encode the map; each but the first halves its size (section 3.3 of the paper)."""


@dataclass
class ControlNetTask(UnetTask):
    """The task of `train-controlnet`. `networks` has "controlnet"; items also have a `map` [3, H, W] in 0..1."""

    unet: nn.Module = field(kw_only=True)
    """The frozen UNet, on the device of the other networks."""
    autocast: Callable[[], AbstractContextManager[None]] = field(kw_only=True, default=nullcontext)
    """The autocast context of the frozen UNet; that of the trained network is set by the loop."""

    def predicted(self, networks: Networks, noised: Tensor, batch: Batch) -> Tensor:
        conditioning = self.conditioning_arguments(networks, batch)
        down, middle = networks["controlnet"](
            noised, batch["t"], **conditioning, controlnet_cond=batch["map"], return_dict=False
        )
        with self.autocast():
            output: Tensor = self.unet(
                noised,
                batch["t"],
                **conditioning,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        return output


def new_controlnet(model: LoadedModel, *, seed: int) -> ControlNetModel:
    """A ControlNet whose blocks are copies of the UNet's and whose outputs are zero, float32, on the CPU.

    Raises UsageError for a UNet without a matching ControlNet architecture.
    """
    unet, size = model.unet, cell(model.vae)
    depth = size.bit_length()
    if unet.config.get("time_cond_proj_dim") is not None:
        raise UsageError(
            f"{model.spec.name} was distilled; train a ControlNet for the model that it was distilled from"
        )
    if 2 ** (depth - 1) != size or depth > len(EMBEDDING_WIDTHS):
        raise UsageError(f"{model.spec.name} has latent cells of {size} pixels, which ControlNets do not support")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_WIDTHS[:depth])
