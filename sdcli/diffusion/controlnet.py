"""ControlNets beside the network: what they add to its features; Zhang et al. 2023, arXiv 2302.05543.

The rules are those of diffusers' StableDiffusionControlNetPipeline: several are added up, each has a weight and a part
of the steps, and in guess mode they see the conditional half alone, with weights that grow with the depth, 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli.encoders.condition import Conditioning
from sdcli.io.lean_diffusers import ControlNetModel

Residuals = Callable[[Tensor, Tensor], Mapping[str, Any]]
"""(x [B, C, h, w], timestep) -> what the network takes beside its condition; nothing where no control is active."""
Under = Callable[[Conditioning], Residuals]
"""A step's conditioning -> what the controls add under it."""


@dataclass(frozen=True)
class ActiveControl:
    """A ControlNet, the maps [B, 3, H, W] in 0..1 that it sees, and how strongly and when it is listened to."""

    network: ControlNetModel
    maps: Tensor
    weight: float
    is_active: Callable[[int, int], bool]
    """(index, count) -> whether it has a say in that step, from 0."""


def residuals_along(
    controls: Sequence[ActiveControl], timesteps: Tensor, *, guess: bool = False
) -> Callable[[Conditioning], Residuals]:
    """What the controls add in one run of one predict over `timesteps`, under whatever condition the step has.

    A condition has the maps' number of rows, or that many unconditional ones followed by one or more such groups.
    Of the functions for its conditions one is asked at each timestep: how often, since some schedulers do so twice,
    says which step it is.
    """
    places: dict[float, list[int]] = {}
    for index, t in enumerate(timesteps):
        places.setdefault(float(t), []).append(index)
    guess = guess or any(one.network.config["global_pool_conditions"] for one in controls[:1])

    def under(condition: Conditioning) -> Residuals:
        # what a distilled UNet is told of guidance is no input of a ControlNet
        inputs = {name: rows for name, rows in condition.inputs.items() if name != "timestep_cond"}

        def arguments(first: int) -> dict[str, Any]:
            return Conditioning({name: rows[first:] for name, rows in inputs.items()}).arguments()

        def residuals(x: Tensor, t: Tensor) -> Mapping[str, Any]:
            if not controls:
                return {}
            index = places[float(t)].pop(0)
            batch = len(controls[0].maps)
            alone = batch if guess and len(x) > batch else 0  # the unconditional rows, left as they are
            total: list[Tensor] = []
            for control in controls:
                if not control.is_active(index, len(timesteps)):
                    continue
                # an inpainting UNet sees more channels than a ControlNet does; its own come first
                sample = x[alone:, : control.network.config["in_channels"]].to(control.maps.dtype)
                down, middle = control.network(
                    sample,
                    t,
                    **arguments(alone),
                    controlnet_cond=torch.cat([control.maps] * (len(sample) // batch)),
                    conditioning_scale=control.weight,
                    guess_mode=guess,
                    return_dict=False,
                )
                added = [*down, middle]
                total = [one + other for one, other in zip(total, added, strict=True)] if total else added
            if not total:
                return {}
            if alone:
                total = [torch.cat([one.new_zeros((alone, *one.shape[1:])), one]) for one in total]
            return {"down_block_additional_residuals": total[:-1], "mid_block_additional_residual": total[-1]}

        return residuals

    return under


def with_its_last_rows(
    under: Callable[[Conditioning], Residuals],
) -> tuple[Callable[[Conditioning], Residuals], Residuals]:
    """The same function, and what gives the last rows of its last answer, as many as x has.

    So a network that sees these rows of x once more, at the same timestep, needs no ControlNet to look at them again.
    """
    last: Mapping[str, Any] = {}

    def noting(condition: Conditioning) -> Residuals:
        residuals = under(condition)

        def noted(x: Tensor, t: Tensor) -> Mapping[str, Any]:
            nonlocal last
            last = residuals(x, t)
            return last

        return noted

    def again(x: Tensor, t: Tensor) -> Mapping[str, Any]:
        return {
            name: rows[-len(x) :] if isinstance(rows, Tensor) else [one[-len(x) :] for one in rows]
            for name, rows in last.items()
        }

    return noting, again
