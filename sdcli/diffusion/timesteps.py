"""Parts of a scheduler's timesteps: a last share of them, those from a step on, those before a part is done."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def last_timesteps(scheduler: Any, strength: float) -> Tensor:
    """The last share `strength` (0..1) of the scheduler's timesteps; the scheduler begins there."""
    steps = scheduler.num_inference_steps
    return timesteps_from(scheduler, (steps - int(steps * strength)) * scheduler.order)


def timesteps_from(scheduler: Any, first: int) -> Tensor:
    """The timesteps from number `first` on; the scheduler begins there."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def steps_before(scheduler: Any, timesteps: Tensor, part: float) -> int:
    """How many of its timesteps come before `part` (0..1) of the noise schedule is done.

    Where diffusers' pipelines split a schedule (`denoising_end`, `denoising_start`), but never within a step of Heun's
    method, which has two timesteps.
    """
    levels = scheduler.config.num_train_timesteps
    before = int((timesteps >= round(levels - part * levels)).sum())
    return before - before % int(scheduler.order)
