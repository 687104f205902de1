"""The network as a function of (x, t), and what can be wrapped around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.controlnet import Residuals
from sdcli.encoders.condition import Conditioning
from sdcli.io.lean_diffusers import SD3Transformer2DModel, UNet

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w] float32, timestep) -> model output of the same shape, float32 (noise, x0 or v, as trained)."""


def unet_predict(unet: UNet, condition: Conditioning, residuals: Residuals = lambda x, t: {}) -> Predict:
    """The network under a condition with one row per row of x, and with what ControlNets add to its features."""
    dtype, arguments = next(unet.parameters()).dtype, condition.arguments()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return unet(x.to(dtype), t, **arguments, **residuals(x, t), return_dict=False)[0].float()

    return predict


def transformer_predict(transformer: SD3Transformer2DModel, condition: Conditioning) -> Predict:
    """The transformer of Stable Diffusion 3 under a condition with one row per row of x."""
    dtype, arguments = next(transformer.parameters()).dtype, condition.arguments()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return transformer(x.to(dtype), timestep=t.expand(len(x)), **arguments, return_dict=False)[0].float()

    return predict


Scale = Callable[[Tensor], float]
"""timestep -> the guidance scale there."""


def guided(
    predict: Predict, scale: Scale, *, rescale: float = 0.0, away: tuple[Predict, float] | None = None
) -> Predict:
    """Classifier-free guidance, uncond + scale * (cond - uncond); Ho & Salimans 2022, arXiv 2207.12598.

    `predict` must have been made for the unconditional rows followed by the conditional ones. `rescale` is how far the
    result gets the standard deviation of the conditional output back; Lin et al. 2023, arXiv 2305.08891, section 3.4.
    `away` is a worse predict for the conditional rows alone, and a scale: see `guided_away`.
    """

    def guide(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = predict(torch.cat([x, x]), t).chunk(2)
        output = unconditional + scale(t) * (conditional - unconditional)
        if away is not None:
            output = output + away[1] * (conditional - away[0](x, t))
        if not rescale:
            return output
        wanted, got = (one.std(dim=list(range(1, one.ndim)), keepdim=True) for one in (conditional, output))
        return rescale * (output * (wanted / got)) + (1 - rescale) * output

    return guide


def guided_away(predict: Predict, worse: Predict, scale: float) -> Predict:
    """cond + scale * (cond - worse), without an unconditional half; Ahn et al. 2024, arXiv 2403.17377, equation 11."""

    def guide(x: Tensor, t: Tensor) -> Tensor:
        conditional = predict(x, t)
        return conditional + scale * (conditional - worse(x, t))

    return guide


def composed(predict: Predict, weights: Sequence[Sequence[float]]) -> Predict:
    """Several prompts as one, uncond + sum_i w_i (cond_i - uncond); Liu et al. 2022, arXiv 2206.01714, equation 11.

    `weights` has for each prompt a weight an image. `predict` must have been made for the unconditional rows and then
    those of each prompt; the result is what `guided` takes: x twice in, the unconditional and one conditional half out.
    """

    def compose(x: Tensor, t: Tensor) -> Tensor:
        half = x.chunk(2)[0]
        unconditional, *conditional = predict(torch.cat([half] * (1 + len(weights))), t).chunk(1 + len(weights))
        total = unconditional
        for output, weight in zip(conditional, weights, strict=True):
            total = total + x.new_tensor(weight)[:, None, None, None] * (output - unconditional)
        return torch.cat([unconditional, total])

    return compose


def stepwise(predict_at: Callable[[int], Predict], steps: Mapping[float, int]) -> Predict:
    """Another predict at each step; `steps` says which one a timestep belongs to (see `steps_by_timestep`)."""
    return lambda x, t: predict_at(steps[float(t)])(x, t)


def steps_by_timestep(timesteps: Tensor, steps: int) -> dict[float, int]:
    """Timestep -> the number of its step, 1..steps.

    A scheduler that asks the network twice at a timestep (Heun, PNDM) ends one step there and begins the next, which
    is the one that counts. Of steps that Karras' noise levels round to one timestep (from some 50 on, near the end)
    the last counts.
    """
    return {float(t): index * steps // len(timesteps) + 1 for index, t in enumerate(timesteps)}


def conditional_half(predict: Predict) -> Predict:
    """What `guided` takes at a scale of 1."""
    return lambda x, t: predict(torch.cat([x, x]), t).chunk(2)[1]


def evenly(first: float, last: float, timesteps: Tensor) -> Scale:
    """The scale that goes from `first` at the first of the timesteps to `last` at the last, by equal steps."""
    place = {float(t): index for index, t in enumerate(timesteps)}
    return lambda t: first + (last - first) * place[float(t)] / max(len(timesteps) - 1, 1)


def only_within(inside: Predict, outside: Predict, *, timesteps: Tensor) -> Predict:
    """`inside` at these timesteps, `outside` before and after.

    For guidance: Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    within = set(map(float, timesteps))
    return lambda x, t: (inside if float(t) in within else outside)(x, t)


def taking_turns(first: Callable[..., Tensor], second: Callable[..., Tensor], *, after: int) -> Callable[..., Tensor]:
    """A Predict or an Advance that is `first` for so many steps, and `second` from then on.

    The returned function counts the steps, so it serves one run.
    """
    calls = itertools.count()
    return lambda *inputs: (first if next(calls) < after else second)(*inputs)


def scaled_input(predict: Predict, scheduler: Any) -> Predict:
    """Scale x as the scheduler wants its network input (by 1/sqrt(sigma^2 + 1) for the sigma family)."""
    return lambda x, t: predict(scheduler.scale_model_input(x, t), t)


def with_scale(condition: Conditioning, scale: float, *, size: int) -> Conditioning:
    """The condition of a network that was distilled to take the guidance scale as an input of `size` numbers (LCM)."""
    hidden = condition.inputs["encoder_hidden_states"]
    embedding = guidance_embedding(scale - 1, size).to(hidden).expand(len(hidden), -1)
    return Conditioning({**condition.inputs, "timestep_cond": embedding})


def guidance_embedding(scale: float, size: int) -> Tensor:
    """Sinusoidal embedding [1, size] of a guidance scale; Luo et al. 2023 (LCM), after Vaswani et al. 2017."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor([scale * 1000.0])[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, size - 2 * half))
