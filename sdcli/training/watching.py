"""Validation and sample sheets between steps: they never end a run, and they give way to a signal within a layer.

The checkpoint of the step is on the disk before they begin. What fails here becomes a warning, and is counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.nn.modules.module import register_module_forward_pre_hook

from sdcli.errors import SdcliError, first_line
from sdcli.io.out_of_memory import out_of_memory
from sdcli.request.schema import first_problem
from sdcli.training.evaluation import evaluating
from sdcli.training.events import Event, RunNote, SamplesSaved, ValidationMetrics
from sdcli.training.task import Networks, Task

WATCHED = ("validation", "samples")


@dataclass
class Watching:
    """The validation and the sample sheets of a run, in its first process."""

    task: Task
    run: Path
    networks: Callable[[], Networks]
    """The networks of the finished model: averages where there are some."""
    failed: Counter[str] = field(default_factory=Counter)
    """How many validations and sample sheets failed."""

    def report(self, done: int, *, validate: bool, sample: bool, give_way: Callable[[], bool]) -> Iterator[Event]:
        """Validate and generate samples as asked, until `give_way` returns True.

        Yields a warning for what fails or is left out. Raises nothing but a repeated signal.
        """
        work: list[tuple[str, Callable[[int], Event | None]]] = []
        work += [("validation", self._validate)] if validate else []
        work += [("samples", self._sample)] if sample else []
        for what, make in work:
            try:
                with abandoned_if(give_way):
                    event = make(done)
            except Abandoned:
                yield RunNote(f"no {what} at step {done}: a signal came first")
            except Exception as error:
                self.failed[what] += 1
                yield RunNote(f"no {what} at step {done}: {_sentence(error)}; the run goes on")
            else:
                if event is not None:
                    yield event

    def _validate(self, done: int) -> Event | None:
        networks = self.networks()
        with evaluating(networks.values()), torch.no_grad():
            figures = self.task.validate(networks)
        return ValidationMetrics(done, figures) if figures else None

    def _sample(self, done: int) -> Event | None:
        networks = self.networks()
        with evaluating(networks.values()), torch.no_grad():
            paths = self.task.samples(networks, done, self.run / "samples")
        return SamplesSaved(done, paths) if paths else None


class Abandoned(BaseException):
    """Work was given up for something more urgent. Not an error: no `except Exception` may swallow it."""


@contextlib.contextmanager
def abandoned_if(urgent: Callable[[], bool]) -> Iterator[None]:
    """Raise Abandoned within the block where a layer of any network is called and `urgent` returns True.

    A denoising step calls hundreds of layers, so this takes less than one step.
    """
    if urgent():
        raise Abandoned
    thread = threading.get_ident()

    def check(*_: Any) -> None:
        if threading.get_ident() == thread and urgent():
            raise Abandoned

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _sentence(error: Exception) -> str:
    if isinstance(error, SdcliError):
        return str(error)
    if isinstance(error, ValidationError):
        return first_problem(error)
    return "out of memory" if out_of_memory(error) else first_line(error)
