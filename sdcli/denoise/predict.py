"""The UNet as a function of (x, t), and what can be wrapped around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdcli.conditioning.condition import Condition
from sdcli.lean_imports import UNet

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w] float32, timestep) -> model output of the same shape, float32 (noise, x0 or v, as trained)."""


def unet_predict(unet: UNet, condition: Condition) -> Predict:
    """The plain network under a condition with one row per row of x."""
    dtype, arguments = next(unet.parameters()).dtype, condition.arguments()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return unet(x.to(dtype), t, **arguments, return_dict=False)[0].float()

    return predict


def guided(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance, uncond + scale * (cond - uncond); Ho & Salimans 2022, arXiv 2207.12598.

    `predict` must have been made for the unconditional rows followed by the conditional ones.
    """

    def guide(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = predict(torch.cat([x, x]), t).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guide


def scaled_input(predict: Predict, scheduler: Any) -> Predict:
    """Scale x as the scheduler wants its network input (by 1/sqrt(sigma^2 + 1) for the sigma family)."""
    return lambda x, t: predict(scheduler.scale_model_input(x, t), t)


def with_scale(condition: Condition, scale: float, *, size: int) -> Condition:
    """The condition of a network that was distilled to take the guidance scale as an input of `size` numbers (LCM)."""
    hidden = condition.inputs["encoder_hidden_states"]
    embedding = guidance_embedding(scale - 1, size).to(hidden).expand(len(hidden), -1)
    return Condition({**condition.inputs, "timestep_cond": embedding})


def guidance_embedding(scale: float, size: int) -> Tensor:
    """Sinusoidal embedding [1, size] of a guidance scale; Luo et al. 2023 (LCM), after Vaswani et al. 2017."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor([scale * 1000.0])[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, size - 2 * half))
