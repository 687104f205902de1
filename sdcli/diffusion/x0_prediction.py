"""What a step says of the finished image: x_t as the network saw it, and the x_0 that its answer means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.errors import UsageError


@torch.inference_mode()
def x_t_and_x0(scheduler: Any, step: Step) -> tuple[Tensor, Tensor]:
    """x_t at the scale of a network's input, and the guess of x_0, each [B, C, h, w] float32.

    A scheduler's x_t is signal x_0 + noise epsilon; networks are trained where the squares of the two add up to 1, and
    say what `x0_of` reads. In flow matching the two themselves add up to 1, and a network says the velocity
    epsilon - x_0. The scheduler is one whose timesteps are set as they were for the step; thresholds and clipping are
    not applied. Where an epsilon is all that is left, as at zero terminal SNR, it says nothing of x_0, and the guess is
    0. Raises UsageError for another kind of prediction.
    """
    signal, noise = _level(scheduler, step)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return step.x, step.x - noise * step.output
    scale = (signal**2 + noise**2) ** 0.5
    seen = step.x / scale
    return seen, x0_of(kind, step.output, seen, signal / scale, noise / scale).nan_to_num(0, 0, 0)


def x0_of(kind: str, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """The x_0 that a network's output of some kind (epsilon, sample, v_prediction) means, the shape of x_t.

    x_t is signal x_0 + noise epsilon with signal^2 + noise^2 = 1; v is of Salimans & Ho 2022, arXiv 2202.00512. For
    epsilon undefined (infinite) where no signal is left. Raises UsageError for another kind.
    """
    match kind:
        case "epsilon":
            return (x_t - noise * output) / signal
        case "sample":
            return output.float()
        case "v_prediction":
            return signal * x_t - noise * output
    raise UsageError(f"what a network means that predicts {kind!r} is not known, so its steps cannot be shown")


def _level(scheduler: Any, step: Step) -> tuple[Tensor, Tensor]:
    """How much of x_t is signal and how much noise. Sigmas are noise per signal, for timesteps between the trained."""
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = scheduler.alphas_cumprod.to(step.x.device)[step.t.long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    # steps that were left out, as for a start image, are the first ones; not so where a refiner does some of them
    place, times = len(scheduler.timesteps) - step.count + step.index, scheduler.timesteps
    if not 0 <= place < len(times) or times[place] != step.t:
        place = int((times == step.t).nonzero()[0])
    sigma = scheduler.sigmas[place].to(step.x)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver and UniPC keep x_t at the network's own scale
        signal, noise = scheduler._sigma_to_alpha_sigma_t(sigma)
        return signal, noise
    return torch.ones_like(sigma), sigma
