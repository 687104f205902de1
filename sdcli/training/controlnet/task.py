"""`sdcli train-controlnet`: teach a copy of a UNet's first half to guide the UNet by a map.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdcli.errors import UsageError
from sdcli.io.lean_diffusers import ControlNetModel, UNet2DConditionModel
from sdcli.models.loader import LoadedModel
from sdcli.training.task import Batch, Networks
from sdcli.training.unet.task import UnetTask
from sdcli.vae.autoencoder import cell

EMBEDDING_WIDTHS = (16, 32, 96, 256)
"""Channels of the layers that see the map; each but the first halves it (section 3.3 of the paper)."""


@dataclass
class ControlNetTask(UnetTask):
    """See `task.Task`. `networks` holds "controlnet"; items have a `map` [3, H, W] in 0..1, and what a UNet's have."""

    unet: nn.Module = field(kw_only=True)
    """Stays as it is, on the device of the others."""
    autocast: Callable[[], AbstractContextManager[None]] = field(kw_only=True, default=nullcontext)
    """The precision of the frozen UNet's work; the trained network brings its own."""

    def predicted(self, networks: Networks, noised: Tensor, batch: Batch) -> Tensor:
        condition = self.condition(networks, batch)
        down, middle = networks["controlnet"](
            noised, batch["t"], **condition, controlnet_cond=batch["map"], return_dict=False
        )
        with self.autocast():
            output: Tensor = self.unet(
                noised,
                batch["t"],
                **condition,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        return output


def new_controlnet(model: LoadedModel, *, seed: int) -> ControlNetModel:
    """A ControlNet whose blocks are copies of the UNet's and whose outputs are zero, float32, on the CPU.

    Raises UsageError for a UNet that none can be made of.
    """
    unet, size = model.unet, cell(model.vae)
    depth = size.bit_length()
    if not isinstance(unet, UNet2DConditionModel) or unet.config.get("time_cond_proj_dim") is not None:
        raise UsageError(f"{model.spec.name} was distilled; a ControlNet is made of the model it came from")
    if 2 ** (depth - 1) != size or depth > len(EMBEDDING_WIDTHS):
        raise UsageError(f"{model.spec.name} has latent cells of {size} pixels, which no ControlNet is made for")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING_WIDTHS[:depth])
