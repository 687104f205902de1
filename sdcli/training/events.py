"""The events of a training run, from its preparation to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Preparation:
    """Progress before the first step: `done` of `total` images examined, latents encoded and so on."""

    what: str
    """The work in a few words, to be shown before the count: "examining images"."""
    done: int
    total: int | None = None


@dataclass(frozen=True)
class RunStart:
    """The first step starts, or the one after `start_step` in a resumed run."""

    steps: int | None
    """Total steps of the run; None where only --max-hours limits it."""
    start_step: int
    """Steps that were done before."""
    batch: int
    """Samples of one optimizer step, over all processes."""
    parameters: int
    trainable: int
    mixed_precision: str = "no"
    """The precision of the forward and backward passes: no, bf16 or fp16."""


@dataclass(frozen=True)
class StepMetrics:
    """Figures of training up to optimizer step `step`: means over the steps since the previous such event."""

    step: int
    steps: int | None
    loss: float
    lr: float
    grad_norm: float | None
    """L2 norm of all gradients before clipping."""
    samples_per_second: float
    waiting: float
    """Share of the time spent waiting for data, 0..1."""
    seconds: float
    """Duration of one step."""
    memory_bytes: int | None
    """Peak memory: of the CUDA device, else of the process."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further figures of the trainer by name, such as the terms of its loss."""
    samples: int | None = None
    """Samples trained on since the first step."""


@dataclass(frozen=True)
class ValidationMetrics:
    """Figures over the held-out data; at least `loss`."""

    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete and on the disk."""

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
    """A message for the user, which is also logged."""

    text: str
    warning: bool = True
    """Whether it is a warning rather than information."""


@dataclass(frozen=True)
class RunEnd:
    """The last event of a run. `reason` completes "ended after step N: ..."."""

    step: int
    reason: str
    failed: Mapping[str, int] = field(default_factory=dict)
    """How many validations, sample sheets and lines of the log failed, by their name; the run went on."""


Event = Preparation | RunStart | StepMetrics | ValidationMetrics | CheckpointSaved | SamplesSaved | RunNote | RunEnd
