"""Micro-batches for the loop, prepared ahead: by worker processes, or by a thread while the networks compute."""

from __future__ import annotations

import itertools
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sdcli.training.task import Batch, Draw, Task


@dataclass(frozen=True)
class Share:
    """Which part of every step is this process's: `rank` of `world`, in micro-batches of `batch`."""

    batch: int
    accumulation: int
    rank: int = 0
    world: int = 1

    def of(self, draws: list[Draw]) -> list[list[Draw]]:
        """A step's draws -> this process's micro-batches. Together the processes take every draw once."""
        starts = ((micro * self.world + self.rank) * self.batch for micro in range(self.accumulation))
        return [draws[start : start + self.batch] for start in starts]


class Feed:
    """Yields each step's micro-batches, on the device, and counts the seconds that were spent waiting for them.

    A context manager: on exit the thread and the worker processes end.
    """

    def __init__(
        self, task: Task, *, share: Share, first_step: int, device: torch.device, workers: int = 0, ahead: int = 2
    ) -> None:
        self.waited = 0.0
        self._accumulation = share.accumulation
        self._device = device
        ahead_of_workers: dict[str, Any] = {"prefetch_factor": max(2, ahead * share.accumulation)} if workers else {}
        loader: DataLoader[Any] = DataLoader(
            _Items(task),
            batch_sampler=_MicroBatches(task, share, first_step),
            num_workers=workers,
            collate_fn=task.collate,
            worker_init_fn=_leave_signals_to_the_main_process,
            pin_memory=device.type == "cuda",
            **ahead_of_workers,
        )
        self._batches = iter(loader)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, ahead * share.accumulation))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="training-feed", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def step(self) -> list[Batch]:
        """The micro-batches of the next step. Raises what preparing them raised."""
        return [self._next() for _ in range(self._accumulation)]

    def _next(self) -> Batch:
        began = time.perf_counter()
        batch = self._queue.get()
        self.waited += time.perf_counter() - began
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _prepare(self) -> None:
        try:
            for batch in self._batches:
                self._put(on_device(batch, self._device))
                if self._ended.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, batch: Batch | BaseException) -> None:
        while not self._ended.is_set():
            try:
                self._queue.put(batch, timeout=0.1)
                return
            except queue.Full:
                continue


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


class _Items(Dataset[dict[str, Any]]):
    """The task's items, by draw. In a worker process this is all that runs."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self._task.item(draw)


class _MicroBatches(Sampler[list[Draw]]):
    """This process's draws, micro-batch by micro-batch, without end."""

    def __init__(self, task: Task, share: Share, first_step: int) -> None:
        self._task, self._share, self._first = task, share, first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in itertools.count(self._first):
            yield from self._share.of(self._task.draws(step))


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C reaches the whole group of processes; the main one finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
