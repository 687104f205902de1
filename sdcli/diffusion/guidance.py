"""Guidance: wrappers of `Predict` that combine several outputs of the network into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdcli.diffusion.predict import Predict
from sdcli.encoders.condition import Conditioning

Scale = Callable[[Tensor], float]
"""timestep -> the guidance scale there."""


def guided(
    predict: Predict, scale: Scale, *, rescale: float = 0.0, perturbed: tuple[Predict, float] | None = None
) -> Predict:
    """Classifier-free guidance, uncond + scale * (cond - uncond); Ho & Salimans 2022, arXiv 2207.12598.

    `predict` must have been made for the unconditional rows followed by the conditional ones. `rescale` is how far the
    result gets the standard deviation of the conditional output back; Lin et al. 2023, arXiv 2305.08891, section 3.4.
    `perturbed` is a perturbed predict for the conditional rows alone and its scale, as in `perturbation_guided`.
    """

    def guide(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = predict(torch.cat([x, x]), t).chunk(2)
        output = unconditional + scale(t) * (conditional - unconditional)
        if perturbed is not None:
            output = output + perturbed[1] * (conditional - perturbed[0](x, t))
        if not rescale:
            return output
        wanted, got = (one.std(dim=list(range(1, one.ndim)), keepdim=True) for one in (conditional, output))
        return rescale * (output * (wanted / got)) + (1 - rescale) * output

    return guide


def perturbation_guided(predict: Predict, perturbed: Predict, scale: float) -> Predict:
    """cond + scale * (cond - perturbed), with no unconditional half; Ahn et al. 2024, arXiv 2403.17377, equation 11."""

    def guide(x: Tensor, t: Tensor) -> Tensor:
        conditional = predict(x, t)
        return conditional + scale * (conditional - perturbed(x, t))

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


def conditional_half(predict: Predict) -> Predict:
    """The output of `guided` at a scale of 1."""
    return lambda x, t: predict(torch.cat([x, x]), t).chunk(2)[1]


def linear_scale(first: float, last: float, timesteps: Tensor) -> Scale:
    """The scale that changes from `first` at the first of the timesteps to `last` at the last, by equal steps."""
    place = {float(t): index for index, t in enumerate(timesteps)}
    return lambda t: first + (last - first) * place[float(t)] / max(len(timesteps) - 1, 1)


def only_within(inside: Predict, outside: Predict, *, timesteps: Tensor) -> Predict:
    """`inside` at these timesteps, `outside` before and after.

    For guidance: Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    within = set(map(float, timesteps))
    return lambda x, t: (inside if float(t) in within else outside)(x, t)


def with_guidance_embedding(condition: Conditioning, scale: float, *, size: int) -> Conditioning:
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
