#!/usr/bin/env python3
"""What attention maps cost: denoising steps of one UNet with and without them, in turns, in one process.

The ratio counts, the seconds belong to the machine; on a CPU they are the process's own, so that a busy machine changes
them little. Small networks on small images pay the most: there the maps are a large part of a layer's work.

    python scripts/bench_heatmap.py                                    # random-sd15, 512x512, guided
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
    parser.add_argument("--model", default="random-sd15", help="a registry name or a diffusers folder")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of turns")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
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
        f"{plain / arguments.steps:.3f} s a step, with maps {mapped / arguments.steps:.3f} s; "
        f"ratio {ratio:.3f} (median of {arguments.rounds} pairs)"
    )


if __name__ == "__main__":
    main()
