"""Conditioning: the inputs of the denoiser beside x and the timestep, one row per image, and how they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ADDED = ("text_embeds", "time_ids")
"""What diffusers' UNet takes inside `added_cond_kwargs`."""
IMAGES = "image_embeds"
"""What the names of image prompts begin with; the UNet takes them there too, as one list with an entry an adapter."""


@dataclass(frozen=True)
class Conditioning:
    """Rows of what the network takes, by the name it takes it under.

    `encoder_hidden_states` [B, L, D] of a text encoder, or `class_labels` [B] int64, or nothing at all; SDXL adds
    `text_embeds` [B, P], of the whole text, and `time_ids` [B, 6] float32, sizes in pixels (the refiner [B, 5]).
    Stable Diffusion 3 adds `pooled_projections` [B, P] of the whole text.
    Each IP-Adapter adds `image_embeds:N`, [B, 1, P] of a whole image or [B, 1, T, D] of its patches.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def rows(cls, conditions: Sequence[Conditioning]) -> Conditioning:
        """The rows of several conditions of one kind, one after the other."""
        return cls({name: torch.cat([one.inputs[name] for one in conditions]) for name in conditions[0].inputs})

    def arguments(self) -> dict[str, Any]:
        """The inputs as the network's keyword arguments."""
        images = {name: rows for name, rows in self.inputs.items() if name.startswith(IMAGES)}
        added: dict[str, Any] = {name: rows for name, rows in self.inputs.items() if name in ADDED}
        own = {name: rows for name, rows in self.inputs.items() if name not in added and name not in images}
        added |= {IMAGES: list(images.values())} if images else {}
        return {**own, "added_cond_kwargs": added} if added else own


@dataclass(frozen=True)
class ConditioningSchedule:
    """The conditioning of a batch over its steps.

    A condition has the unconditional rows first, where the batch is guided, then those of the prompts; where they are
    several that AND joins, first the first one of each image, then the second one, ...
    """

    at: Callable[[int], Conditioning]
    """The condition of a step; steps count from 1."""
    changes: bool = False
    """Whether the steps differ."""
    weights: tuple[tuple[float, ...], ...] = ()
    """Of each prompt that AND joins, a weight an image; empty where there is nothing to compose."""
