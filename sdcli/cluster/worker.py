"""The loop of a worker process, as a class whose methods Ray calls: one unit at a time, in one thread."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import sdcli
from sdcli.cluster.units import Attempt, FromWorker, Program, UnitEnded, Work, WorkerReady, WorkerUnusable, Working
from sdcli.errors import NotFound, SdcliError, UsageError, first_line, packed_error
from sdcli.io.threads import use_threads, wait_without_spinning

WORKING = 0.5
"""Seconds between two reports about the same unit."""


def versions() -> dict[str, str]:
    """What must be equal on the driver and its workers, as it goes into the images or changes them."""
    names = ("torch", "diffusers", "transformers")
    return {"sdcli": sdcli.__version__, **{name: importlib.metadata.version(name) for name in names}}


class ClusterWorker:
    """A worker process. `start` comes first, `run` for each unit; `cancel` comes from another thread."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._cancelled = threading.Event()

    def start(self, program: Program, threads: int, expected: dict[str, str]) -> FromWorker:
        """Import and set up everything that does not depend on a unit; `threads` are those of torch."""
        began = time.monotonic()
        try:
            _check_versions(expected)
            _enter(program)
            wait_without_spinning()
            use_threads(threads)
            import torch

            torch.set_num_threads(threads)  # also where the cluster's own variables say something else
            module, _, name = program.start.partition(":")
            self._work = getattr(importlib.import_module(module), name)(program.setup)
        except SdcliError as error:
            return WorkerUnusable(packed_error(error))
        except Exception as error:
            return WorkerUnusable(packed_error(_unexpected(error)))
        return WorkerReady(socket.gethostname(), os.getpid(), time.monotonic() - began)

    def run(self, attempt: Attempt) -> Iterator[FromWorker]:
        """What the program's function yields for a unit, and `UnitEnded`."""
        assert self._work is not None
        last = 0.0
        try:
            for message in self._work(attempt, self._cancelled.is_set):
                if isinstance(message, Working):
                    if time.monotonic() - last < WORKING:
                        continue
                    last = time.monotonic()
                yield message
        except SdcliError as error:
            yield UnitEnded(packed_error(error))
        except Exception as error:
            yield UnitEnded(packed_error(_unexpected(error)), broken=True, trace=traceback.format_exc())
        else:
            yield UnitEnded()

    def cancel(self) -> None:
        """Stop the unit as soon as its function asks. No other unit will come."""
        self._cancelled.set()


def _unexpected(error: Exception) -> SdcliError:
    return SdcliError(f"unexpected {type(error).__name__}: {first_line(error)}")


def _check_versions(expected: dict[str, str]) -> None:
    here = versions()
    different = next((name for name, version in expected.items() if here[name] != version), None)
    if different is not None:
        raise UsageError(
            f"{socket.gethostname()} has {different} {here[different]}, the driver has {expected[different]}; "
            "install the same versions on all nodes"
        )


def _enter(program: Program) -> None:
    """Change to the driver's folder. Raises NotFound where this node does not share its disk."""
    node = socket.gethostname()
    try:
        os.chdir(program.folder)
    except OSError as error:
        raise NotFound(f"{node} has no folder {program.folder} ({error.strerror}); all nodes must share it") from None
    if program.probe is not None and not Path(program.probe).exists():
        raise NotFound(
            f"{node} does not see the files in {Path(program.probe).parent}; all nodes must share that folder"
        )
