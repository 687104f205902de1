"""The interface between trainers and the training loop: networks, samples, losses, files and sample images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
"""A micro-batch on the device: tensors [b, ...] by name, and lists of other values."""
Networks = Mapping[str, nn.Module]
"""The trained networks by the name of their folder, as prepared by the loop (autocast, DDP)."""


@dataclass(frozen=True)
class Draw:
    """One sample of one step. `counter` is its number in the whole run, which seeds everything random about it."""

    counter: int
    index: int
    """The item of the data set."""
    size: tuple[int, int] | None = None
    """Width and height of the bucket, for images."""


@dataclass(frozen=True)
class Losses:
    """A micro-batch's loss (a scalar with gradient, the mean over its samples) and further figures for the log."""

    loss: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars; their mean over the step is logged."""


@dataclass(frozen=True)
class OptimizerPhase:
    """One optimizer and its loss. Most trainers have one phase; a discriminator is a second one within each step."""

    name: str
    groups: Sequence[dict[str, Any]]
    """Parameter groups for the optimizer: {"name": str, "params": {name: parameter}, "lr": float}, in a fixed order."""
    loss: Callable[[Networks, Batch], Losses]


class Task(Protocol):
    """A trainer. Its methods are pure functions of the settings, their arguments and the networks."""

    networks: dict[str, nn.Module]
    """All networks with trained parameters, by folder name ("unet", "vae", "text_encoder", "discriminator")."""
    averaged: tuple[str, ...]
    """Those of them that may have a moving average (EMA)."""
    phases: Sequence[OptimizerPhase]

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step, as many as the total batch size; the first step is 0."""

    def item(self, draw: Draw) -> dict[str, Any]:
        """What the loss needs of one sample: float32 or int64 tensors without a batch axis.

        May run in a worker process; its randomness comes from `io.rng`, by the draw's counter.
        """

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """Items -> a micro-batch, on the CPU."""

    def item_name(self, index: int) -> str:
        """An item's name in messages."""

    def validate(self, networks: Networks) -> dict[str, float]:
        """Figures over the held-out data, with fixed randomness; {} where nothing is held out."""

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """Write the trained parts as sub-folders of `folder` in diffusers' layout (`unet`, and `unet_ema`).

        A task with an attribute `hurried` takes less time where that is True, as the run may be killed within seconds.
        """

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """Write samples for people to look at into `folder`; returns the files."""
