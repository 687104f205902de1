"""What the training loop tells while it runs: one small dataclass for each kind of event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Preparation:
    """Work before the first step goes on: `done` of `total` images examined, latents encoded."""

    what: str
    """In a word or two that fit before a count: "examining images"."""
    done: int
    total: int | None = None


@dataclass(frozen=True)
class RunStart:
    """The steps begin, from the first or, resumed, from after `start_step`."""

    steps: int | None
    """How many steps the run will have when it ends; None where only the time limits it."""
    start_step: int
    """Steps that are done already."""
    batch: int
    """Samples of one optimizer step, over all processes."""
    parameters: int
    trainable: int


@dataclass(frozen=True)
class StepMetrics:
    """Optimizer steps up to number `step` are done; the figures are means over those since the last event."""

    step: int
    steps: int | None
    loss: float
    lr: float
    grad_norm: float | None
    """L2 norm of all gradients before clipping."""
    samples_per_second: float
    waiting: float
    """Share of the time that was spent waiting for data, 0..1."""
    seconds: float
    """Of one step."""
    memory_bytes: int | None
    """The most that was in use: of the accelerator's memory, or the process's where there is none."""
    shown: Mapping[str, float] = field(default_factory=dict)
    """Further figures of the trainer, by name: the parts of the loss, say."""
    samples: int | None = None
    """Samples seen since the first step."""


@dataclass(frozen=True)
class ValidationMetrics:
    """The held-out images were measured; `figures` has at least `loss`."""

    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole and on the disk."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class SamplesSaved:
    """Sample images were generated and written."""

    step: int
    paths: Sequence[Path]


@dataclass(frozen=True)
class RunNote:
    """Something the user should read, and find in the log later."""

    text: str
    warning: bool = True
    """Whether it may be other than was wanted; else it is only told."""


@dataclass(frozen=True)
class RunEnd:
    """The last event of a run. `reason` completes "ended after step N: ..."."""

    step: int
    reason: str


Event = Preparation | RunStart | StepMetrics | ValidationMetrics | CheckpointSaved | SamplesSaved | RunNote | RunEnd
