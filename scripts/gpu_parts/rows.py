"""Rows of figures, and contenders that are measured in turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_train import peak as peak_bytes

from sdcli.errors import first_line

Row = dict[str, Any]
Contender = Callable[[], Any]


class NeedsCuda(Exception):
    """A contender exists on CUDA devices only."""


def emit(*rows: Row) -> None:
    print(json.dumps({"rows": list(rows)}), flush=True)


def skipped(name: str, reason: str) -> Row:
    return {"name": name, "skipped": reason}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Contenders in turns


def in_turns(
    contenders: dict[str, Callable[[], Contender]], device: torch.device, *, rounds: int, per: dict[str, int]
) -> None:
    """Measure contenders in turns and print their rows after every round.

    Each is made by its factory and warmed up, by its `warm_up` or a call; one that fails is a row that says why. `per`
    divides the seconds of a call into its columns, such as {"step_s": 50}. The ratios are relative to the first one.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Contender] = {}
    seconds: dict[str, list[float]] = {}
    for name, make in contenders.items():
        try:
            wait(device)
            started = time.perf_counter()
            run = make()
            getattr(run, "warm_up", run)()
            wait(device)
        except NeedsCuda:
            rows[name] = skipped(name, "it needs a CUDA device")
        except Exception as error:
            rows[name] = skipped(name, f"{type(error).__name__}: {first_line(error)}")
        else:
            ready[name], rows[name] = run, {"name": name, "warm_up_s": time.perf_counter() - started}
        emit(rows[name])
    for _ in range(rounds):
        for name, run in ready.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait(device)
            started = time.perf_counter()
            run()
            wait(device)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
            peak = peak_bytes(device.type) if device.type == "cuda" else None  # of a process, elsewhere
            first = statistics.median(seconds[next(iter(seconds))])
            median = statistics.median(seconds[name])
            columns = {column: median / count for column, count in per.items()}
            columns |= {"ratio": first / median} if len(contenders) > 1 else {}
            warm_up = rows[name]["warm_up_s"]
            rows[name] = {"name": name, **columns, "peak_bytes": peak, "warm_up_s": warm_up}
            emit(rows[name])


def needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NeedsCuda
