"""The condition: what the denoiser is told beside x and the timestep, one row a picture; and how it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Rows of what the network takes, by the name it takes it under.

    `encoder_hidden_states` [B, L, D] of a text encoder, or `class_labels` [B] int64, or nothing at all.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def rows(cls, conditions: Sequence[Condition]) -> Condition:
        """The rows of several conditions of one kind, one after the other."""
        return cls({name: torch.cat([one.inputs[name] for one in conditions]) for name in conditions[0].inputs})


@dataclass(frozen=True)
class Conditions:
    """What a batch is told over its steps.

    A condition has the unconditional rows first, where the batch is guided, then those of the prompts; where they are
    several that AND joins, first the first one of each picture, then the second one, ...
    """

    at: Callable[[int], Condition]
    """The condition of a step; steps count from 1."""
    changes: bool = False
    """Whether the steps differ."""
    weights: tuple[tuple[float, ...], ...] = ()
    """Of each prompt that AND joins, a weight a picture; empty where there is nothing to compose."""
