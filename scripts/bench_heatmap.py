#!/usr/bin/env python3
"""Measure the cost of attention maps: denoising steps of one UNet with and without them, in turns, in one process.

Compare the ratio: the seconds depend on the machine. On a CPU they are CPU time, which other processes hardly change.
The cost is highest for small networks and small images, where the maps are a large part of a layer's work.

    python scripts/bench_heatmap.py                                    # random-sd15, 512x512, with guidance
    python scripts/bench_heatmap.py --model starter --size 128 --steps 20
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-sd15", help="a registered model or a diffusers folder (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="image width and height in pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps per turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    import torch

    from sdcli.diffusion.attention.maps import AttentionMaps
    from sdcli.models.loader import load_model
    from sdcli.models.registry import load_registry

    spec = load_registry().find(arguments.model)
    model = load_model(spec, device=arguments.device, dtype=arguments.dtype, parts=("unet",))
    unet, side, rows = model.unet, arguments.size // 8, 2 * arguments.batch
    x = torch.randn(rows, unet.config.in_channels, side, side).to(model.device, model.dtype)
    text = torch.randn(rows, 77, unet.config.cross_attention_dim).to(model.device, model.dtype)
    t = torch.tensor(500, device=model.device)

    clock = time.process_time if model.device.type == "cpu" else time.perf_counter

    @torch.inference_mode()
    def turn(maps: AttentionMaps | None) -> float:
        began = clock()
        with maps.watching(unet) if maps is not None else contextlib.nullcontext():
            for _ in range(arguments.steps):
                unet(x, t, encoder_hidden_states=text)
                if maps is not None:
                    maps.step((side, side))
        if maps is not None:
            maps.mean(0)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    turn(AttentionMaps(arguments.batch))
    pairs = [(turn(None), turn(AttentionMaps(arguments.batch))) for _ in range(arguments.rounds)]
    plain, mapped = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(mapped / plain for plain, mapped in pairs)
    print(
        f"{spec.name}, {arguments.size}x{arguments.size}, batch {arguments.batch}, {model.dtype}: "
        f"{plain / arguments.steps:.3f} s per step, with maps {mapped / arguments.steps:.3f} s; "
        f"ratio {ratio:.3f} (median of {arguments.rounds} pairs)"
    )


if __name__ == "__main__":
    main()
