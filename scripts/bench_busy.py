#!/usr/bin/env python3
"""Measure commands beside other work: whole processes, while N processes spin on the same cores.

    python scripts/bench_busy.py --load 0 2 --rounds 3

Policies of waiting at OpenMP's barriers take turns in every round, so that a slow moment of the machine affects all
alike: sdcli's own, the one that libgomp has by default (threads spin for milliseconds), and a single thread. For each
load and command the table has the median seconds of each, and their ratio to the CPU seconds that a single thread
needs without any load: with as many spinning processes as cores, a fair share makes that ratio 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_startup import SDCLI, machine
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SPIN = [sys.executable, "-c", "while True: pass"]
OWN, DEFAULT, ONE = "sdcli", "libgomp's default", "one thread"
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
POLICIES = {OWN: {}, DEFAULT: {"GOMP_SPINCOUNT": "300000"}, ONE: {"OMP_NUM_THREADS": "1"}}
"""Environment variables of each; sdcli sets nothing where one of its variables is set already."""
COMMANDS = {
    "generate": ["generate", "a red fox", "--seed", "0", "-o", "image.png"],
    "generate, 9 images": ["generate", "a red fox", "--seed", "0", "-n", "9", "--outdir", "images"],
    "encode": ["encode", "photo.png", "-o", "out.safetensors"],
    "decode": ["decode", "latents.safetensors", "-o", "image.png"],
    "train-unet": [
        *("train-unet", "photos", "-o", "run", "--max-train-steps", "8", "--train-batch-size", "8", "--seed", "0"),
        *("--cache-dir", "cache", "--validation-split", "0"),
    ],
    "generate, SD 1.5": [
        *("generate", "a red fox", "-m", "random-sd15", "--seed", "0", "--steps", "4", "--size", "256x256"),
        *("-o", "image.png"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, nargs="+", default=[0, 2], help="spinning processes (%(default)s)")
    parser.add_argument("-n", "--rounds", type=int, default=3, help="counted runs of each (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="commands (all)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="policies (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and the machine's name to this file")
    chosen = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work)
        for name in chosen.only:
            run(work, COMMANDS[name], {})  # warms the disk cache, makes random weights
            for load in chosen.load:
                with spinning(load):
                    results.append({"command": name, "load": load, "runs": measure(work, name, chosen)})
                show(results, chosen.policies)
    if chosen.json:
        report = {"machine": machine(), "rounds": chosen.rounds, "results": results}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_inputs(work: Path) -> None:
    """A photo of noise, its latents, and a small captioned data set."""
    (work / "photos").mkdir()
    for number in range(16):
        photo = Image.effect_noise((128, 128), 60 + number).convert("RGB")
        photo.save(work / "photos" / f"{number}.png")
        (work / "photos" / f"{number}.txt").write_text(f"noise {number}", encoding="utf-8")
    photo.save(work / "photo.png")
    run(work, ["encode", "photo.png", "-o", "latents.safetensors"], {})


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """While the block runs, so many processes use all the CPU that they get."""
    processes = [subprocess.Popen(SPIN) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(work: Path, name: str, chosen: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Policy -> wall and CPU seconds of each round."""
    runs: dict[str, list[tuple[float, float]]] = {policy: [] for policy in chosen.policies}
    for _ in range(chosen.rounds):
        for policy, times in runs.items():
            times.append(run(work, COMMANDS[name], POLICIES[policy]))
    return runs


def run(work: Path, arguments: list[str], policy: dict[str, str]) -> tuple[float, float]:
    """Wall seconds of one whole process, and its CPU seconds."""
    for output in ("image.png", "images", "out.safetensors", "run"):
        subprocess.run(["rm", "-rf", str(work / output)], check=True)
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = others | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | policy
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*SDCLI, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(wall, 3), round(cpu, 3)


def show(results: list[dict[str, object]], policies: list[str]) -> None:
    """Print the newest result, with ratios to the CPU seconds of one thread without load, if these were measured."""
    newest = results[-1]
    runs: dict[str, list[tuple[float, float]]] = newest["runs"]  # type: ignore[assignment]
    if len(results) == 1:
        print(f"{machine()}; wall seconds, median; in brackets: times the CPU seconds of one thread without load\n")
        print(f"{'command':22}{'load':>5}" + "".join(f"{policy:>26}" for policy in policies))
    unloaded = [one["runs"] for one in results if one["command"] == newest["command"] and one["load"] == 0]
    need = statistics.median(cpu for _, cpu in unloaded[0][ONE]) if unloaded and ONE in policies else None  # type: ignore[index]
    row = f"{newest['command']:22}{newest['load']:5}"
    for policy in policies:
        wall = statistics.median(seconds for seconds, _ in runs[policy])
        ratio = f" ({wall / need:.2f})" if need else ""
        row += f"{f'{wall:.2f}{ratio}':>26}"
    print(row, flush=True)


if __name__ == "__main__":
    main()
