"""The trace of an image: x_t and the x0 prediction at chosen steps, as a strip and an animation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.x0_prediction import x0_predictor
from sdcli.generation.events import SideFile
from sdcli.generation.observers.observer import Decode
from sdcli.generation.observers.trace_images import Moment, animation, check_chosen, chosen, strip
from sdcli.generation.settings import TraceSettings
from sdcli.images.pixels import from_pixels
from sdcli.request.schema import ResolvedRequest


@dataclass(frozen=True)
class TraceObserver:
    """Traces every image of a batch."""

    settings: TraceSettings

    def check(self, pipeline: Pipeline, request: ResolvedRequest) -> None:
        """Every image can be traced; the chosen steps are checked when their number is known."""

    def record(
        self, pipeline: Pipeline, requests: Sequence[ResolvedRequest], decode: Decode
    ) -> AbstractContextManager[TraceRecording]:
        """A recording without any step yet."""
        return contextlib.nullcontext(TraceRecording(pipeline, requests, decode, self.settings))


@dataclass(frozen=True)
class _ChosenStep:
    number: int
    count: int
    t: float
    x_t: Tensor
    x0: Tensor
    second_pass: bool


@dataclass
class TraceRecording:
    """x_t and the x0 prediction of the chosen steps, on the CPU; they are decoded when the files are made."""

    pipeline: Pipeline
    requests: Sequence[ResolvedRequest]
    decode: Decode
    settings: TraceSettings
    _steps: list[_ChosenStep] = field(default_factory=list)
    _passes: int = 0

    def __post_init__(self) -> None:
        self._predict_x0 = x0_predictor(self.pipeline, self.requests[0])

    def add(self, step: Step) -> None:
        """Record a step if it is a chosen one."""
        if step.index == 0:
            self._passes += 1
            if self._passes == 1:
                check_chosen(self.settings.steps, step.count, self.requests[0].final_size)
        if step.index + 1 in chosen(self.settings.steps, step.count):
            x_t, x0 = self._predict_x0(step)
            second = self._passes == 2
            self._steps.append(_ChosenStep(step.index + 1, step.count, float(step.t), x_t.cpu(), x0.cpu(), second))

    def files(self, position: int, pixels: Tensor) -> Iterator[SideFile]:
        """The strip and the animation."""
        moments = [
            Moment(
                step.number,
                step.count,
                step.t,
                x_t=from_pixels(self.decode(step.x_t[position])),
                x0=from_pixels(self.decode(step.x0[position])),
                second_pass=step.second_pass,
            )
            for step in self._steps
        ]
        yield ".trace.png", strip(moments)
        yield f".trace.{self.settings.format}", animation(moments, format=self.settings.format)
