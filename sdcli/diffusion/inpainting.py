"""Wrappers for inpainting: keep a part of the image through the steps, or show the mask to an inpainting model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.predict import Predict
from sdcli.diffusion.scheduler_factory import Advance


def keep_unmasked(
    advance: Advance, x0: Tensor, noise: Tensor, mask: Tensor, *, scheduler: Any, timesteps: Tensor
) -> Advance:
    """After each step, where `mask` [B, 1, h, w] is 0, x is x_0 with as much of `noise` as the next step expects.

    The returned function counts the steps, so it serves one run over `timesteps`.
    """
    upcoming = iter(timesteps[1:])

    def advance_(output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        x, following = advance(output, t, x), next(upcoming, None)
        kept = x0 if following is None else scheduler.add_noise(x0, noise, following[None])
        return (1 - mask) * kept + mask * x

    return advance_


def append_channels(predict: Predict, channels: Tensor) -> Predict:
    """The network of an inpainting model, which takes mask and masked latents [B, 5, h, w] behind x's own channels."""
    return lambda x, t: predict(torch.cat([x, channels.repeat(len(x) // len(channels), 1, 1, 1)], dim=1), t)
