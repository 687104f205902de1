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

from sdcli.conditioning.condition import Condition
from sdcli.lean_imports import ControlNetModel

Residuals = Callable[[Tensor, Tensor], Mapping[str, Any]]
"""(x [B, C, h, w], timestep) -> what the network takes beside its condition; nothing where no control is active."""


@dataclass(frozen=True)
class ActiveControl:
    """A ControlNet, the maps [B, 3, H, W] in 0..1 that it sees, and how and when it is listened to."""

    network: ControlNetModel
    maps: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    """The part of the steps, as fractions of their number."""

    def is_active(self, index: int, count: int) -> bool:
        """Whether it has a say in step `index` of `count`."""
        return index / count >= self.start and (index + 1) / count <= self.end


def residuals_of(
    controls: Sequence[ActiveControl], condition: Condition, *, timesteps: Tensor, guess: bool = False, halves: int = 1
) -> Residuals:
    """What the controls add, under a condition with `halves` times as many rows as the maps have: 2 when guided.

    The returned function counts how often it is asked about a timestep (some schedulers ask twice), so it serves one
    run over `timesteps`.
    """
    inputs = {name: rows for name, rows in condition.inputs.items() if name != "timestep_cond"}
    alone = guess and halves == 2  # then the first half, the unconditional one, is left as it is
    if alone:
        inputs = {name: rows.chunk(2)[1] for name, rows in inputs.items()}
    maps = [one.maps if alone else torch.cat([one.maps] * halves) for one in controls]
    places: dict[float, list[int]] = {}
    for index, t in enumerate(timesteps):
        places.setdefault(float(t), []).append(index)

    def residuals(x: Tensor, t: Tensor) -> Mapping[str, Any]:
        index = places[float(t)].pop(0)
        x = x.chunk(2)[1] if alone else x
        total: list[Tensor] = []
        for control, seen in zip(controls, maps, strict=True):
            if not control.is_active(index, len(timesteps)):
                continue
            # an inpainting UNet sees more channels than a ControlNet does; its own come first
            sample = x[:, : control.network.config["in_channels"]].to(seen.dtype)
            down, middle = control.network(
                sample,
                t,
                **inputs,
                controlnet_cond=seen,
                conditioning_scale=control.weight,
                guess_mode=guess,
                return_dict=False,
            )
            added = [*down, middle]
            total = [one + other for one, other in zip(total, added, strict=True)] if total else added
        if not total:
            return {}
        if alone:
            total = [torch.cat([torch.zeros_like(one), one]) for one in total]
        return {"down_block_additional_residuals": total[:-1], "mid_block_additional_residual": total[-1]}

    return residuals
