"""The training loop's events on stderr: a bar with figures below it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from sdcli.cli.ui.console import Console, plain_terminal, printable
from sdcli.cli.ui.progress import HEARTBEAT, rich_bar
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
"""Of the moving averages that are shown, a step."""


class TrainingDisplay:
    """Shows a run's events on stderr; shows nothing with -q. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._live: Any = None
        self._figures: Any = None
        self._task: Any = None
        self._preparing = ""
        self._spoke = 0.0
        self._pace = _Pace()

    def __enter__(self) -> Self:
        if not self._console.quiet and not plain_terminal():
            from rich.console import Group
            from rich.live import Live
            from rich.text import Text

            self._figures = Text()
            self._bar = rich_bar("{task.fields[left]}")
            self._live = Live(
                Group(self._bar, self._figures),
                console=self._bar.console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Show an event: figures in place or every few seconds, what happens rarely on a line of its own."""
        match event:
            case Preparation():
                self._prepare(event)
            case RunStart():
                self._start(event)
            case StepMetrics():
                self._train(event)
            case ValidationMetrics():
                self._console.note(f"step {event.step}: validation {_figures(event.figures)}")
            case CheckpointSaved():
                self._console.note(f"step {event.step}: checkpoint in {event.path} ({event.seconds:.1f} s)")
            case SamplesSaved():
                for path in event.paths:
                    self._console.note(f"step {event.step}: samples in {path}")
            case RunNote():
                self._console.note(event.text)
            case RunEnd():
                self._console.note(f"ended after step {event.step}: {event.reason}")

    def _prepare(self, event: Preparation) -> None:
        new = event.what != self._preparing
        self._preparing = event.what
        if self._bar is not None:
            if new:
                self._new_task(event.what, event.total)
            self._bar.update(self._task, completed=event.done, total=event.total)
        elif new or event.done == event.total or self._silent_for(HEARTBEAT):
            self._spoke = time.monotonic()
            of = f" of {event.total:,}" if event.total is not None else ""
            count = f": {event.done:,}{of}" if event.done or of else ""
            self._console.note(f"{event.what}{count}")

    def _start(self, event: RunStart) -> None:
        self._preparing = ""
        self._pace.start(event.start_step)
        steps = f"{event.steps:,} steps" if event.steps is not None else "until the time is over, steps"
        after = f", going on after step {event.start_step:,}" if event.start_step else ""
        trainable = "" if event.trainable == event.parameters else f"{event.trainable:,} of "
        parameters = f"{trainable}{event.parameters:,} parameters"
        self._console.note(f"training {parameters}, {steps} of {event.batch} samples{after}")
        if self._bar is not None:
            self._new_task("training", event.steps)
            self._bar.update(self._task, completed=event.start_step)

    def _train(self, event: StepMetrics) -> None:
        self._pace.add(event)
        if self._bar is not None:
            if self._task is None:
                self._new_task("training", event.steps)
            self._figures.plain = self._pace.figures(event)
            self._bar.update(self._task, completed=event.step, total=event.steps, left=self._pace.left(event))
        elif self._pace.first or event.step == event.steps or self._silent_for(HEARTBEAT):
            self._spoke = time.monotonic()
            of = f" of {event.steps}" if event.steps is not None else ""
            left = self._pace.left(event)
            self._console.note(f"step {event.step}{of}: {self._pace.figures(event)}{f', {left}' if left else ''}")

    def _new_task(self, description: str, total: int | None) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._figures.plain = ""
        self._task = self._bar.add_task(printable(description), total=total, left="")

    def _silent_for(self, seconds: float) -> bool:
        return time.monotonic() - self._spoke > seconds


class _Pace:
    """How quickly the steps go by, and how the loss does, averaged over the last ones."""

    def __init__(self) -> None:
        self.first = True
        """Whether no more than one event of steps was added."""
        self._start: int | None = None
        self._began = 0.0
        self._loss, self._seconds = MovingAverage(LOSS_DECAY), MovingAverage(SPEED_DECAY)
        self._shown = (0.0, 0.0)

    def start(self, step: int) -> None:
        """The first step after this one begins now."""
        self._start, self._began = step, time.monotonic()

    def add(self, event: StepMetrics) -> None:
        """Take in the figures of steps that are done."""
        self.first = self._shown == (0.0, 0.0)
        if self._start is None:
            self.start(event.step)
        self._shown = (self._loss.add(event.loss), self._seconds.add(event.seconds))

    def figures(self, event: StepMetrics) -> str:
        """The figures in one line, each with its unit."""
        loss, seconds = self._shown
        parts = [f"loss {loss:.4g}", f"{1 / max(seconds, 1e-9):.2f} it/s", f"{event.samples_per_second:.1f} samples/s"]
        parts += [f"waiting {event.waiting:.0%}", f"lr {event.lr:.2e}"]
        if event.memory_bytes is not None:
            parts.append(f"{event.memory_bytes / 2**30:.1f} GiB")
        return ", ".join(parts)

    def left(self, event: StepMetrics) -> str:
        """The time that is left, judged by all steps so far, with their pauses for checkpoints and samples."""
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
