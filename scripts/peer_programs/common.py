"""What every measured program computes: its inputs, the guidance, and how its calls are timed and kept."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "random-sd15"
GUIDANCE, TIMESTEP, SEED = 7.5, 500.0, 0
STEP, DECODE = "step", "decode"
PARTS = (STEP, DECODE)
Call = Callable[[], Any]
Figures = dict[str, Any]


def inputs(size: int) -> dict[str, Any]:
    """Latents and text states of both guided halves, and latents to decode."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    cells = size // 8
    one = noise(1, 4, cells, cells)
    return {
        "x": torch.cat([one, one]),
        "t": torch.tensor([TIMESTEP]),
        "states": noise(2, 77, 768),
        "latents": noise(1, 4, cells, cells),
    }


def guide(output: Any) -> Any:
    """The two halves of a UNet's output, without and with the prompt, as one."""
    return output[:1] + GUIDANCE * (output[1:] - output[:1])


def timed(arguments: argparse.Namespace, calls: dict[str, Call], *, started: float, version: str) -> Figures:
    """Run each call once unmeasured, keeping what it gives, then `--repeats` times."""
    import numpy

    figures: Figures = {"load_s": time.perf_counter() - started, "version": version}
    for part in arguments.parts:
        numpy.save(output_file(arguments, arguments.worker, part), numpy.asarray(calls[part]()))
        figures[part] = []
        for _ in range(arguments.repeats):
            begun = time.perf_counter()
            calls[part]()
            figures[part].append(time.perf_counter() - begun)
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return figures


def output_file(arguments: argparse.Namespace, name: str, part: str) -> Path:
    """Where an array that a program computed is kept, to be compared with sdcli's."""
    return Path(arguments.work / f"{name}-{part}-{arguments.size}.npy")
