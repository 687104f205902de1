"""Progress of a training run on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import ProgressBar
from sdcli.training.events import (
    CheckpointSaved,
    Event,
    Preparation,
    RunEnd,
    RunNote,
    RunStart,
    SamplesSaved,
    StepMetrics,
    ValidationMetrics,
)
from sdcli.training.smoothing import MovingAverage

LOSS_DECAY, SPEED_DECAY = 0.98, 0.9
"""Decay per step of the moving averages of loss and seconds."""


class TrainingProgress(ProgressBar):
    """A run's events on stderr: metrics below a bar or every few seconds, rare events on lines of their own."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, remaining=False)
        self._task_name = ""
        self._pace = _Pace()

    def report(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Preparation():
                self._prepare(event)
            case RunStart():
                self._begin(event)
            case StepMetrics():
                self._step(event)
            case ValidationMetrics():
                self._console.note(f"step {event.step}: validation {_figures(event.figures)}")
            case CheckpointSaved():
                self._console.note(f"step {event.step}: checkpoint in {event.path} ({event.seconds:.1f} s)")
            case SamplesSaved():
                for path in event.paths:
                    self._console.note(f"step {event.step}: samples in {path}")
            case RunNote():
                (self._console.warn if event.warning else self._console.note)(event.text)
            case RunEnd():
                failed = ", ".join(f"{count} {what}" for what, count in event.failed.items())
                failures = f" (failed meanwhile: {failed})" if failed else ""
                self._console.note(f"ended after step {event.step}: {event.reason}{failures}")

    def _prepare(self, event: Preparation) -> None:
        new = self._enter(event.what, event.total)
        of = f" of {event.total:,}" if event.total is not None else ""
        line = f"{event.what}: {event.done:,}{of}" if event.done or of else event.what
        self.update(event.done, event.total, line=line, always=new or event.done == event.total)

    def _begin(self, event: RunStart) -> None:
        self._pace.start(event.start_step)
        steps = f"{event.steps:,} steps" if event.steps is not None else "until the time is over, steps"
        after = f", continuing after step {event.start_step:,}" if event.start_step else ""
        trainable = "" if event.trainable == event.parameters else f"{event.trainable:,} of "
        precision = "" if event.mixed_precision == "no" else f", in {event.mixed_precision}"
        self._console.note(
            f"training {trainable}{event.parameters:,} parameters, {steps} of {event.batch} samples{precision}{after}"
        )
        self._enter("training", event.steps)

    def _step(self, event: StepMetrics) -> None:
        self._enter("training", event.steps)
        self._pace.add(event)
        figures, left = self._pace.figures(event), self._pace.left(event)
        of = f" of {event.steps}" if event.steps is not None else ""
        self.update(
            event.step,
            event.steps,
            line=f"step {event.step}{of}: {figures}{f', {left}' if left else ''}",
            always=self._pace.first or event.step == event.steps,
            note=left,
            footer=figures,
        )

    def _enter(self, name: str, total: int | None) -> bool:
        """Begin the task unless it is the current one; whether it is new."""
        new, self._task_name = name != self._task_name, name
        if new:
            self.start(name, total)
        return new


class _Pace:
    """Moving averages of loss and speed, and the remaining time."""

    def __init__(self) -> None:
        self.first = True
        """Whether at most one event has been added."""
        self._start: int | None = None
        self._began = 0.0
        self._loss, self._seconds = MovingAverage(LOSS_DECAY), MovingAverage(SPEED_DECAY)
        self._shown = (0.0, 0.0)

    def start(self, step: int) -> None:
        """The step after this one begins now."""
        self._start, self._began = step, time.monotonic()

    def add(self, event: StepMetrics) -> None:
        """Add the metrics of finished steps."""
        self.first = self._shown == (0.0, 0.0)
        if self._start is None:
            self.start(event.step)
        self._shown = (self._loss.add(event.loss), self._seconds.add(event.seconds))

    def figures(self, event: StepMetrics) -> str:
        """The metrics in one line, each with its unit."""
        loss, seconds = self._shown
        parts = [f"loss {loss:.4g}", f"{1 / max(seconds, 1e-9):.2f} it/s", f"{event.samples_per_second:.1f} samples/s"]
        parts += [f"waiting {event.waiting:.0%}", f"lr {event.lr:.2e}"]
        if event.memory_bytes is not None:
            parts.append(f"{event.memory_bytes / 2**30:.1f} GiB")
        return ", ".join(parts)

    def left(self, event: StepMetrics) -> str:
        """The remaining time, estimated from all steps so far, checkpoints and samples included."""
        done = event.step - (self._start or 0)
        if event.steps is None or done <= 0 or event.step >= event.steps:
            return ""
        return f"{_duration((time.monotonic() - self._began) / done * (event.steps - event.step))} left"


def _duration(seconds: float) -> str:
    """0:07, 12:34, 1:23:45 or 3 d 04:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
