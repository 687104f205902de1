"""ControlNets in the loop: the residuals they add to the network's features; Zhang et al. 2023, arXiv 2302.05543.

As in diffusers' StableDiffusionControlNetPipeline: the residuals of several are summed, each has a weight and a part
of the steps, and in guess mode they get the conditional half alone, with weights that grow with the depth, 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.encoders.condition import Conditioning
from sdcli.io.lean_diffusers import ControlNetModel
from sdcli.models.controlnet import controlnet_of
from sdcli.request.schema import ResolvedRequest

Residuals = Callable[[Tensor, Tensor], Mapping[str, Any]]
"""(x [B, C, h, w], timestep) -> what the network takes beside its condition; nothing where no control is active."""


@dataclass(frozen=True)
class ActiveControl:
    """A ControlNet, its input maps [B, 3, H, W] in 0..1, its weight, and the steps in which it is active."""

    network: ControlNetModel
    maps: Tensor
    weight: float
    is_active: Callable[[int, int], bool]
    """(index, count) -> whether it adds residuals in that step, counted from 0."""


def active_controls(pipeline: Pipeline, requests: Sequence[ResolvedRequest]) -> list[ActiveControl]:
    """The controls of one pass, their maps at the size of its requests, which differ in the maps' images alone.

    Raises NotFound, BadImage and UsageError for the files that the requests name.
    """
    model, size = pipeline.model, (requests[0].width, requests[0].height)

    def maps(number: int) -> Tensor:
        controls = [request.controls[number] for request in requests]
        return torch.stack([pipeline.inputs.control_map(one.image, one.preprocessor, size) for one in controls])

    return [
        ActiveControl(
            controlnet_of(model, shared.model),
            maps(number).to(model.device, model.dtype),
            weight=shared.weight,
            is_active=shared.is_active,
        )
        for number, shared in enumerate(requests[0].controls)
    ]


def control_residuals(
    controls: Sequence[ActiveControl], timesteps: Tensor, *, guess_mode: bool = False
) -> Callable[[Conditioning], Residuals]:
    """Condition -> the residuals of the controls in one run over `timesteps`.

    A condition has as many rows as the maps, or that many unconditional ones followed by one or more such groups.
    Exactly one of the returned functions is called at each timestep; a timestep that occurs twice (some schedulers
    call the network twice) stands for the next step each time.
    """
    places: dict[float, list[int]] = {}
    for index, t in enumerate(timesteps):
        places.setdefault(float(t), []).append(index)
    guess_mode = guess_mode or any(one.network.config["global_pool_conditions"] for one in controls[:1])

    def of_condition(condition: Conditioning) -> Residuals:
        # the guidance embedding of a distilled UNet is not an input of a ControlNet
        inputs = {name: rows for name, rows in condition.inputs.items() if name != "timestep_cond"}

        def arguments(first: int) -> dict[str, Any]:
            return Conditioning({name: rows[first:] for name, rows in inputs.items()}).arguments()

        def residuals(x: Tensor, t: Tensor) -> Mapping[str, Any]:
            if not controls:
                return {}
            index = places[float(t)].pop(0)
            batch = len(controls[0].maps)
            alone = batch if guess_mode and len(x) > batch else 0  # the unconditional rows, left as they are
            total: list[Tensor] = []
            for control in controls:
                if not control.is_active(index, len(timesteps)):
                    continue
                # an inpainting UNet takes more channels than a ControlNet; x's own channels come first
                sample = x[alone:, : control.network.config["in_channels"]].to(control.maps.dtype)
                down, middle = control.network(
                    sample,
                    t,
                    **arguments(alone),
                    controlnet_cond=torch.cat([control.maps] * (len(sample) // batch)),
                    conditioning_scale=control.weight,
                    guess_mode=guess_mode,
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

    return of_condition


def reuse_last_residuals(
    of_condition: Callable[[Conditioning], Residuals],
) -> tuple[Callable[[Conditioning], Residuals], Residuals]:
    """The same function, and one that returns the last rows of its last result, as many as x has.

    A network that gets these rows of x once more, at the same timestep, needs no second call of the ControlNets.
    """
    last: Mapping[str, Any] = {}

    def recording(condition: Conditioning) -> Residuals:
        residuals = of_condition(condition)

        def recorded(x: Tensor, t: Tensor) -> Mapping[str, Any]:
            nonlocal last
            last = residuals(x, t)
            return last

        return recorded

    def reused(x: Tensor, t: Tensor) -> Mapping[str, Any]:
        return {
            name: rows[-len(x) :] if isinstance(rows, Tensor) else [one[-len(x) :] for one in rows]
            for name, rows in last.items()
        }

    return recording, reused
