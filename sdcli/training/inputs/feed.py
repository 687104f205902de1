"""Prepares micro-batches ahead of the loop, in worker processes or in a thread while the networks compute."""

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
    "a worker process that prepares samples was killed, perhaps out of memory: fewer --dataloader-num-workers need less"
)


@dataclass(frozen=True)
class Share:
    """The part of every step that this process computes: `rank` of `world`, in micro-batches of `batch`."""

    batch: int
    accumulation: int
    rank: int = 0
    world: int = 1

    def of(self, draws: list[Draw]) -> list[list[Draw]]:
        """A step's draws -> this process's micro-batches. Each draw belongs to exactly one process."""
        starts = ((micro * self.world + self.rank) * self.batch for micro in range(self.accumulation))
        return [draws[start : start + self.batch] for start in starts]


class Feed:
    """Returns each step's micro-batches on the device; `waited` sums up the seconds spent waiting for them.

    A context manager that ends the thread and the worker processes on exit.
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
            collate_fn=partial(_collate, task),
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
        try:
            self._thread.join()
        finally:
            self._stack.close()

    def step(self) -> list[Batch]:
        """The micro-batches of the next step. Raises what their preparation raised; SdcliError for a dead worker."""
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
                if isinstance(batch, _ItemError):
                    raise batch.error
                self._put(on_device(batch, self._device))
                if self._ended.is_set():
                    return
        except BaseException as error:
            final = isinstance(error, SdcliError) or not isinstance(error, Exception)
            self._put(error if final or not self._worker_died() else SdcliError(WORKER_DIED))

    def _worker_died(self) -> bool:
        """Whether an error comes from a dead worker, for which torch raises different errors at different moments.

        Its connection can break a moment before the system counts it as dead.
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
    """Move a batch's tensors to the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


@dataclass(frozen=True)
class _ItemError:
    """Takes the place of an item or a batch. torch would turn an exception into the text of its traceback."""

    error: SdcliError


class _Items(Dataset[dict[str, Any] | _ItemError]):
    """The task's items, by draw. Worker processes run only this and `_collate`."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getitem__(self, draw: Draw) -> dict[str, Any] | _ItemError:
        try:
            return self._task.item(draw)
        except SdcliError as error:
            return _ItemError(error)


def _collate(task: Task, items: list[dict[str, Any] | _ItemError]) -> Batch | _ItemError:
    errors = [item for item in items if isinstance(item, _ItemError)]
    return errors[0] if errors else task.collate([item for item in items if not isinstance(item, _ItemError)])


class _MicroBatches(Sampler[list[Draw]]):
    """This process's draws, one micro-batch after another, endlessly."""

    def __init__(self, task: Task, share: Share, first_step: int) -> None:
        self._task, self._share, self._first = task, share, first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in itertools.count(self._first):
            yield from self._share.of(self._task.draws(step))


@contextlib.contextmanager
def _workers_of(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches, without torch's SIGCHLD handler.

    That handler raises an error for a dead worker wherever the main thread is, even within a checkpoint. The feed's
    thread notices a dead worker within seconds, too, and raises at the next step.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    batches = iter(loader)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield batches
    finally:
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        if in_main_thread:
            signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _leave_signals_to_the_main_process(_: int) -> None:
    """A signal often reaches the whole process group (Ctrl-C, srun, docker).

    The main process finishes its step, for which it needs its workers.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
