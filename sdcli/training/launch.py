"""Starts several processes on this machine, each with its own rank, as `accelerate launch` and torchrun do.

Those end with exit code 1 after any failure; here the exit code of the failed process is kept.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

MARK = "SDCLI_RANKS_STARTED"
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that every rank gets from the launcher."""


def inside_a_launch() -> bool:
    """Whether a launcher has already started this process as one of several."""
    return "LOCAL_RANK" in os.environ or "RANK" in os.environ


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m sdcli <arguments>` once per rank; the exit code of the rank that failed first, or 0.

    Signals are passed on (see `PASSED_ON`); when one rank fails, the others are terminated.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    handled = [signal.Signals[name] for name in PASSED_ON if name != "SIGHUP" or not ignored]
    before = {number: signal.signal(number, pass_on) for number in handled}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: it would end a rank that has not yet started to listen
    for rank in range(processes):
        environment = {
            **os.environ,
            MARK: "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
        }
        ranks.append(subprocess.Popen([sys.executable, "-m", "sdcli", *arguments], env=environment))
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        return _first_failure(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    code = 0
    running = list(ranks)
    while running:
        for rank in list(running):
            try:
                answer = rank.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            running.remove(rank)
            if answer and not code:
                code = answer if answer > 0 else 128 - answer
                _end(running)
    return code


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End processes that wait for the failed one in a collective call, where Python's signal handlers do not run."""
    for rank in ranks:
        try:
            rank.wait(timeout=5)
        except subprocess.TimeoutExpired:
            rank.kill()
