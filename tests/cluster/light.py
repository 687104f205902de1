"""Units of work for tests of a real cluster, without torch: each item is a small file, and a payload can do harm.

Used by name, `tests.cluster.light:start`, in the worker processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.cluster.units import Attempt, FromWork, ItemRow, Work, Working
from sdcli.errors import CannotWrite
from sdcli.io.files import AlreadyExists, write_whole


@dataclass(frozen=True)
class Harm:
    """What a unit does instead of its work: `times` times, or whenever it is tried."""

    kind: str
    """`kill`, `raise`, `full`, `exit`, `slow`."""
    times: int = 100
    after: int = 0
    """So many items are done before."""


def start(folder: str) -> Work:
    """A function that writes the items of a unit as files into a folder, and notes who wrote what."""
    root = Path(folder)
    (root / "workers").mkdir(exist_ok=True)
    (root / "workers" / str(os.getpid())).write_text("")

    def work(attempt: Attempt, cancelled: Callable[[], bool]) -> Iterator[FromWork]:
        harm: Harm | None = attempt.payload
        for number, item in enumerate(attempt.items):
            if item in attempt.done:
                continue
            yield Working(number / len(attempt.items))
            if harm is not None and number >= harm.after and _claim(root, attempt.items[0], harm.times):
                yield from _do(harm, cancelled)
            if cancelled():
                return
            text = json.dumps({"item": item})
            with contextlib.suppress(AlreadyExists):
                write_whole(root / f"{item}.json", text.encode(), overwrite=False)
            yield ItemRow(item, {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]})

    return work


def _claim(root: Path, unit: int, times: int) -> bool:
    """Whether a unit does its harm once more; counted in files, as every process may be the one that dies."""
    for number in range(times):
        with contextlib.suppress(FileExistsError):
            (root / "workers" / f"harm-{unit}-{number}").touch(exist_ok=False)
            return True
    return False


def _do(harm: Harm, cancelled: Callable[[], bool]) -> Iterator[Any]:
    match harm.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        case "exit":
            os._exit(3)
        case "full":
            raise CannotWrite("cannot write x: No space left on device")
        case "raise":
            raise ValueError("an unexpected thing")
        case "slow":
            for step in range(600):
                if cancelled():
                    return
                yield Working(0.0, f"step {step}")
                time.sleep(0.1)
