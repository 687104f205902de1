"""What to do when memory runs out: notice it, give cached memory back, and try the next cheaper way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

import torch

from sdcli.errors import OutOfMemory
from sdcli.io.devices import return_freed_memory

T = TypeVar("T")


class MemoryAttempt:
    """A `with` block that ends quietly where memory runs out; afterwards `failed` is true. Other errors pass."""

    failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        self.failed = isinstance(error, Exception) and out_of_memory(error)
        return self.failed

    def ran_out(self) -> bool:
        """Whether memory ran out in the block; if so, cached memory is given back first.

        To be called behind the block: within, the exception would keep the memory alive.
        """
        if self.failed:
            free_caches()
        return self.failed


def first_that_fits(
    attempts: Iterable[tuple[str | None, Callable[[], T]]], *, otherwise: str
) -> tuple[T, tuple[str, ...]]:
    """The result of the first function for which memory suffices, and the notes of all attempts up to it.

    Each attempt is a function with the note to make once it is tried; None for no note. Raises OutOfMemory with the
    sentence `otherwise` where no attempt fits.
    """
    notes: tuple[str, ...] = ()
    for note, compute in attempts:
        notes = notes if note is None else (*notes, note)
        attempt = MemoryAttempt()
        with attempt:
            return compute(), notes
        attempt.ran_out()
    raise OutOfMemory(otherwise)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: torch has a class for CUDA and a sentence for the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def free_caches() -> None:
    """Give cached memory back before the next attempt."""
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
