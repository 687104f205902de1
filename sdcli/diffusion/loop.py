"""The denoising loop. It never grows an `if` for a feature: those wrap `predict` or `advance`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli.diffusion.predict import Predict
from sdcli.diffusion.scheduler_factory import Advance


@dataclass(frozen=True)
class Step:
    """One finished step: its number from 0, how many there are, its timestep, and the latents after it.

    `x` are the latents before it, and `output` is the output of `predict` for them.
    """

    index: int
    count: int
    t: Tensor
    latents: Tensor
    x: Tensor
    output: Tensor


@torch.inference_mode()
def denoise(predict: Predict, advance: Advance, x: Tensor, timesteps: Tensor) -> Iterator[Step]:
    """Latents [B, C, h, w] with the noise of the first timestep -> steps with ever less; the last holds the result."""
    for index, t in enumerate(timesteps):
        before, output = x, predict(x, t)
        x = advance(output, t, before)
        yield Step(index, len(timesteps), t, x, before, output)
