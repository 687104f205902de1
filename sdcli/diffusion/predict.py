"""The network as a function `Predict` of (x, t), and the wrappers of it that are not about guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sdcli.diffusion.controlnet import Residuals
from sdcli.encoders.condition import Conditioning

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w] float32, timestep) -> model output of the same shape, float32 (noise, x0 or v, as trained)."""


Call = Callable[[Callable[..., Any], Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(network, x, timestep, conditioning) -> its output; see `Family.call`."""


def network_predict(
    network: nn.Module, call: Call, condition: Conditioning, residuals: Residuals = lambda x, t: {}
) -> Predict:
    """The denoiser under a condition with one row per row of x, with the residuals of ControlNets."""
    dtype, arguments = next(network.parameters()).dtype, condition.arguments()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return call(network, x.to(dtype), t, {**arguments, **residuals(x, t)}).float()

    return predict


def stepwise(predict_at: Callable[[int], Predict], steps: Mapping[float, int]) -> Predict:
    """Another predict at each step; `steps` maps a timestep to its step (see `steps_by_timestep`)."""
    return lambda x, t: predict_at(steps[float(t)])(x, t)


def steps_by_timestep(timesteps: Tensor, steps: int) -> dict[float, int]:
    """Timestep -> the number of its step, 1..steps.

    A scheduler that calls the network twice at a timestep (Heun, PNDM) ends one step there and begins the next, which
    is the one that counts. Of steps that Karras' noise levels round to one timestep (from some 50 on, near the end)
    the last counts.
    """
    return {float(t): index * steps // len(timesteps) + 1 for index, t in enumerate(timesteps)}


def switch_after(first: Callable[..., Tensor], second: Callable[..., Tensor], *, after: int) -> Callable[..., Tensor]:
    """A Predict or an Advance that is `first` for `after` steps, and `second` from then on.

    The returned function counts the steps, so it serves one run.
    """
    calls = itertools.count()
    return lambda *inputs: (first if next(calls) < after else second)(*inputs)


def scale_input(predict: Predict, scheduler: Any) -> Predict:
    """Scale x as the scheduler wants its network input (by 1/sqrt(sigma^2 + 1) for the sigma family)."""
    return lambda x, t: predict(scheduler.scale_model_input(x, t), t)
