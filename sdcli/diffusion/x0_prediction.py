"""The x_0 prediction of a step: x_t at the network's scale, and the x_0 that the model output stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import scheduler_for
from sdcli.errors import UsageError
from sdcli.request.schema import ResolvedRequest


def x0_predictor(pipeline: Pipeline, request: ResolvedRequest) -> Callable[[Step], tuple[Tensor, Tensor]]:
    """`x_t_and_x0` for the steps of a request, the last of which may be a refiner's with a scheduler of its own."""
    base = scheduler_for(pipeline.model, request)
    if pipeline.refiner is None:
        return lambda step: x_t_and_x0(base, step)
    assert request.refiner_start is not None
    refining = scheduler_for(pipeline.refiner.model, request)
    begins = float(base.config.num_train_timesteps) * (1 - request.refiner_start)

    def predict_x0(step: Step) -> tuple[Tensor, Tensor]:
        either = (base, refining) if float(step.t) >= begins else (refining, base)
        return x_t_and_x0(next(one for one in either if (one.timesteps == step.t).any()), step)

    return predict_x0


@torch.inference_mode()
def x_t_and_x0(scheduler: Any, step: Step) -> tuple[Tensor, Tensor]:
    """x_t at the scale of a network's input, and the x_0 prediction, each [B, C, h, w] float32.

    A scheduler's x_t is signal x_0 + noise epsilon; networks are trained where the squares of the two add up to 1, and
    their output is one that `x0_of` takes. In flow matching the two themselves add up to 1, and the output is the
    velocity epsilon - x_0. The timesteps of the scheduler are set as they were for the step; thresholds and clipping
    are not applied. Where no signal is left, as at zero terminal SNR, an epsilon does not determine x_0, and the
    prediction is 0. Raises UsageError for another kind of prediction.
    """
    signal, noise = _level(scheduler, step)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return step.x, step.x - noise * step.output
    scale = (signal**2 + noise**2) ** 0.5
    x_t = step.x / scale
    return x_t, x0_of(kind, step.output, x_t, signal / scale, noise / scale).nan_to_num(0, 0, 0)


def x0_of(kind: str, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """The x_0 that a network's output of one kind (epsilon, sample, v_prediction) stands for, the shape of x_t.

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
    raise UsageError(f"the prediction type {kind!r} is unknown, so the steps cannot be shown as images")


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
