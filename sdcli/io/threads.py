"""How the threads of torch wait for each other; to be set before torch is imported."""

from __future__ import annotations

import os
import sys

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that set how the threads of an OpenMP library wait: any, GNU's, and those of LLVM and Intel."""


def wait_without_spinning() -> None:
    """Let the threads of OpenMP sleep at a barrier instead of spinning, unless the environment says how they wait.

    Every operation of a network ends with a barrier. By default, GNU's threads spin there for milliseconds, which takes
    the core from the very thread that they wait for where other programs run, or where two cores are one core's
    hyper-threads (`scripts/bench_busy.py`). The number of threads stays as it is, since it changes sums, and so images.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def use_threads(count: int) -> None:
    """Let torch compute with so many threads, as the variable `OMP_NUM_THREADS` does, for the same bytes."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if (torch := sys.modules.get("torch")) is not None:  # which has read that variable already
        torch.set_num_threads(count)
