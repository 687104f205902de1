"""What a step says of the finished picture: x_t as the network saw it, and the x_0 that its answer means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdcli.denoise.loop import Step
from sdcli.errors import UsageError


@torch.inference_mode()
def seen_and_guessed(scheduler: Any, step: Step) -> tuple[Tensor, Tensor]:
    """x_t at the scale of a network's input, and the guess of x_0, each [B, C, h, w] float32.

    A scheduler's x_t is signal x_0 + noise epsilon; networks are trained where the squares of the two add up to 1, and
    say epsilon, x_0 or v (the formulas of `training.objective.x0_from`). In flow matching the two themselves add up to
    1, and a network says the velocity epsilon - x_0. The scheduler is one whose timesteps are set as they were for the
    step; thresholds and clipping are not applied. Where an epsilon is all that is left, as at zero terminal SNR, it
    says nothing of x_0, and the guess is 0. Raises UsageError for another kind of prediction.
    """
    signal, noise = _level(scheduler, step)
    scale = (signal**2 + noise**2) ** 0.5
    match scheduler.config.get("prediction_type", "flow_prediction"):
        case "flow_prediction":
            return step.x, step.x - noise * step.output
        case "epsilon":
            guess = (step.x - noise * step.output) / signal
        case "sample":
            guess = step.output
        case "v_prediction":
            guess = (signal / scale**2) * step.x - (noise / scale) * step.output
        case other:
            raise UsageError(f"what a network means that predicts {other!r} is not known, so its steps cannot be shown")
    return step.x / scale, guess.nan_to_num(0, 0, 0)


def _level(scheduler: Any, step: Step) -> tuple[Tensor, Tensor]:
    """How much of x_t is signal and how much noise. Sigmas are noise per signal, for timesteps between the trained."""
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = scheduler.alphas_cumprod.to(step.x.device)[step.t.long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    # steps that were left out, as for a start picture, are the first ones; not so where a refiner does some of them
    place, times = len(scheduler.timesteps) - step.count + step.index, scheduler.timesteps
    if not 0 <= place < len(times) or times[place] != step.t:
        place = int((times == step.t).nonzero()[0])
    sigma = scheduler.sigmas[place].to(step.x)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver and UniPC keep x_t at the network's own scale
        signal, noise = scheduler._sigma_to_alpha_sigma_t(sigma)
        return signal, noise
    return torch.ones_like(sigma), sigma
