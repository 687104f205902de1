"""The figures of training steps: means over the steps between two lines of the log, and the peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sdcli.training.events import StepMetrics


@dataclass
class Means:
    """The figures of the steps since the last `StepMetrics`."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, figures: Mapping[str, float], *, seconds: float, waited: float) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.seconds, self.waited = self.steps + 1, self.seconds + seconds, self.waited + waited

    def event(self, done: int, steps: int | None, lr: float, batch: int, device: torch.device) -> StepMetrics:
        means = {name: value / self.steps for name, value in self.sums.items()}
        return StepMetrics(
            step=done,
            steps=steps,
            loss=means.pop("loss"),
            lr=lr,
            grad_norm=means.pop("grad_norm"),
            samples_per_second=batch * self.steps / self.seconds,
            waiting=self.waited / self.seconds,
            seconds=self.seconds / self.steps,
            memory_bytes=peak_memory(device),
            figures=means,
            samples=done * batch,
        )


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of the CUDA device, else of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
