"""What a trainer tells the training loop: which networks, which samples, which loss, what to save and to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
"""A micro-batch on the device: tensors [b, ...] by name, and lists of what is no tensor."""
Networks = Mapping[str, nn.Module]
"""The networks being trained, by the name of their folder, as the loop prepared them (autocast, DDP)."""


@dataclass(frozen=True)
class Draw:
    """One sample of one step. `counter` numbers the samples of the whole run; it seeds all that is random about it."""

    counter: int
    index: int
    """Which item of the data set."""
    size: tuple[int, int] | None = None
    """Width and height of the bucket, for images."""


@dataclass(frozen=True)
class Losses:
    """A micro-batch's loss (scalar, mean over its samples, with gradient) and numbers worth logging beside it."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars; the log holds their mean over the step."""


@dataclass(frozen=True)
class OptimizerPhase:
    """One optimizer and its loss. Most trainers have one phase; a discriminator is a second one of the same step."""

    name: str
    groups: Sequence[dict[str, Any]]
    """Parameter groups for the optimizer: {"name": str, "params": {name: parameter}, "lr": float}, in a fixed order."""
    loss: Callable[[Networks, Batch], Losses]


class Task(Protocol):
    """A trainer. Everything in it is a pure function of the settings and of its arguments, but for the networks."""

    networks: dict[str, nn.Module]
    """Every network with trained parameters, by folder name ("unet", "vae", "text_encoder", "discriminator")."""
    averaged: tuple[str, ...]
    """Which of them have an EMA beside them."""
    phases: Sequence[OptimizerPhase]

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step, total batch size of them; the first step is 0."""

    def item(self, draw: Draw) -> dict[str, Any]:
        """What the loss needs of one sample; runs in worker processes when there are some, and draws its randomness
        from `counted`. Tensors are float32 or int64, without batch axis."""

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """Items -> a micro-batch, on the CPU."""

    def item_name(self, index: int) -> str:
        """What people call an item, for messages."""

    def validate(self, networks: Networks) -> dict[str, float]:
        """Figures over the held-out part, with fixed randomness; {} where nothing is held out."""

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """Write the trained parts as diffusers sub-folders of `folder` (`unet`, and `unet_ema` from `averages`)."""

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """Paint or reconstruct something to look at, into `folder`; returns the files."""
