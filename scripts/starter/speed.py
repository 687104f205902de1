"""Measure how fast the embedded model generates: as a whole process, within a batch, and its VAE alone.

    python scripts/starter/speed.py --rounds 5

prints medians, their targets on two cores, and the time of the shortest diffusers script that generates the same image
(from scripts/bench_startup.py). Machines are noisy: compare the ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench_startup import BY_HAND, COMMANDS, PROMPT, machine, measure

from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.vae.autoencoder import decode, moments

BATCH = 9
WHOLE, WITHIN, ENCODE, DECODE = "whole process", "within a batch", "encode 256x256, warm", "decode 256x256, warm"
TARGETS = {WHOLE: 3.0, WITHIN: 1.0, ENCODE: 0.1, DECODE: 0.1}
"""Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--rounds", type=int, default=5, help="runs of each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and the machine's name to this file")
    chosen = parser.parse_args()
    one = COMMANDS["generate (starter)"]
    several = f"{BATCH} images"
    commands = {WHOLE: one, several: [*one, "-n", str(BATCH)], BY_HAND: COMMANDS[BY_HAND]}
    seconds = measure(commands, rounds=chosen.rounds)
    pairs = zip(seconds[WHOLE], seconds.pop(several), strict=True)
    seconds[WITHIN] = [(batch - whole) / (BATCH - 1) for whole, batch in pairs]
    seconds[ENCODE], seconds[DECODE] = vae_seconds(chosen.rounds)
    print(f"{machine()}; seconds, median of {chosen.rounds}; {PROMPT!r}")
    for name, times in seconds.items():
        target = f"   target {TARGETS[name]}" if name in TARGETS else ""
        print(f"{name:28}{statistics.median(times):8.3f}{target}")
    if chosen.json:
        report = {"machine": machine(), "seconds": seconds}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def vae_seconds(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to encode and to decode one image, each the median of ten consecutive calls."""
    vae = load_model(load_registry().find("starter"), device="cpu", dtype="float32", parts=("vae",)).parts["vae"]
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    latents = moments(vae, pixels)[0]
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, call in zip(found, (lambda: moments(vae, pixels), lambda: decode(vae, latents)), strict=True):
            durations = []
            for _ in range(10):
                start = time.perf_counter()
                call()
                durations.append(time.perf_counter() - start)
            times.append(statistics.median(durations))
    return found


if __name__ == "__main__":
    main()
