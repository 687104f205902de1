"""The denoising loop. It never grows an `if` for a feature: those wrap `predict` or `advance`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli.denoise.predict import Predict
from sdcli.denoise.sampler import Advance


@dataclass(frozen=True)
class Step:
    """One finished step: its number from 0, how many there are, its timestep, and the latents after it."""

    index: int
    count: int
    t: Tensor
    latents: Tensor


@torch.inference_mode()
def denoise(predict: Predict, advance: Advance, x: Tensor, timesteps: Tensor) -> Iterator[Step]:
    """Latents [B, C, h, w] of pure noise -> the same, step by step less noisy; the last step holds the result."""
    for index, t in enumerate(timesteps):
        x = advance(predict(x, t), t, x)
        yield Step(index, len(timesteps), t, x)


@dataclass(frozen=True)
class Stage:
    """A network and its sampler, with the timesteps that are theirs."""

    predict: Predict
    advance: Advance
    timesteps: Tensor


def denoise_in_stages(stages: Sequence[Stage], x: Tensor) -> Iterator[Step]:
    """The same with several networks, each from where the one before it stopped; the steps are counted through."""
    count, done = sum(len(stage.timesteps) for stage in stages), 0
    for stage in stages:
        for step in denoise(stage.predict, stage.advance, x, stage.timesteps):
            x = step.latents
            yield Step(done, count, step.t, x)
            done += 1
