"""Micro-batches for the loop, prepared ahead: by worker processes, or by a thread while the networks compute."""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sdcli.errors import SdcliError
from sdcli.training.task import Batch, Draw, Task

WORKER_DIED = (
    "a worker process that prepares samples was killed, perhaps for want of memory: fewer --dataloader-num-workers "
    "need less; --resume goes on from the last checkpoint"
)


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
        self._loader: DataLoader[Any] = DataLoader(
            _Items(task),
            batch_sampler=_MicroBatches(task, share, first_step),
            num_workers=workers,
            collate_fn=partial(_collated, task),
            worker_init_fn=_leave_signals_to_the_main_process,
            pin_memory=device.type == "cuda",
            **ahead_of_workers,
        )
        self._batches: Iterator[Any] = iter(())
        self._stack = contextlib.ExitStack()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, ahead * share.accumulation))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="training-feed", daemon=True)

    def __enter__(self) -> Self:
        self._batches = self._stack.enter_context(_workers_of(self._loader))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._stack.close()

    def step(self) -> list[Batch]:
        """The micro-batches of the next step. Raises what preparing them raised, and SdcliError for a dead worker."""
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
                if isinstance(batch, _Failed):
                    raise batch.error
                self._put(on_device(batch, self._device))
                if self._ended.is_set():
                    return
        except BaseException as error:
            told = isinstance(error, SdcliError)
            self._put(error if told or not self._a_worker_died() else SdcliError(WORKER_DIED))

    def _a_worker_died(self) -> bool:
        """Asked after an error: what torch raises for a dead worker depends on what it was doing just then.

        A connection to it can break a moment before the system counts it as dead.
        """
        workers = getattr(self._batches, "_workers", [])
        return bool(workers and wait([worker.sentinel for worker in workers], timeout=1))

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


@dataclass(frozen=True)
class _Failed:
    """What came instead of an item or a batch; as an exception, torch would pass it on as the text of a traceback."""

    error: SdcliError


class _Items(Dataset[dict[str, Any] | _Failed]):
    """The task's items, by draw. In a worker process this is all that runs, and `_collated`."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getitem__(self, draw: Draw) -> dict[str, Any] | _Failed:
        try:
            return self._task.item(draw)
        except SdcliError as error:
            return _Failed(error)


def _collated(task: Task, items: list[dict[str, Any] | _Failed]) -> Batch | _Failed:
    whole = [item for item in items if not isinstance(item, _Failed)]
    return task.collate(whole) if len(whole) == len(items) else next(i for i in items if isinstance(i, _Failed))


class _MicroBatches(Sampler[list[Draw]]):
    """This process's draws, micro-batch by micro-batch, without end."""

    def __init__(self, task: Task, share: Share, first_step: int) -> None:
        self._task, self._share, self._first = task, share, first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in itertools.count(self._first):
            yield from self._share.of(self._task.draws(step))


@contextlib.contextmanager
def _workers_of(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches, without torch's signal handler, which raises a worker's death wherever the main thread is.

    In the middle of a checkpoint, say; be it of this loader or of another one before. The feed's thread finds out as
    well, within seconds, and tells it at a step.
    """
    has_handlers = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if has_handlers else None
    batches = iter(loader)
    if has_handlers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield batches
    finally:
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        if has_handlers:
            signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C reaches the whole group of processes; the main one finishes its step, and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
