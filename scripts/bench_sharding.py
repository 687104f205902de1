#!/usr/bin/env python3
"""Measure the memory of `train-unet --sharding full` on a narrow SDXL, beside the forecast that is made before step 1.

    python scripts/bench_sharding.py --json docs/bench/sharding-cpu.json

The model has SDXL's UNet with all its blocks, but --width channels instead of 320 at its highest resolution, text
encoders of one layer, and random weights. Three runs of all weights in float32 with AdamW on the CPU: one process, two
processes, and two processes with --sharding full. Memory is the highest resident set of a process, of all processes of
a run. Two processes see the samples of one, so the losses have to be equal to 1e-5; the exit code is 1 where they are
not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_startup import highest_memory, machine
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdcli.io.files import PACKAGE

ROOT = Path(__file__).resolve().parent.parent
CONFIG = PACKAGE / "models/families/configs/sdxl/unet/config.json"
RUNS = {
    "one process": ("1", "none"),
    "two processes": ("2", "none"),
    "two processes, --sharding full": ("2", "full"),
}
GIB = 2**30


def write_model(folder: Path, width: int) -> int:
    """Write the narrow SDXL as a model folder, and return the number of its UNet's weights."""
    torch.manual_seed(0)
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config |= {
        "block_out_channels": [width, 2 * width, 4 * width],
        "attention_head_dim": [width // 32 * n for n in (1, 2, 4)],
    }
    unet = UNet2DConditionModel.from_config(config)
    small = {"intermediate_size": 64, "num_hidden_layers": 1}
    first = CLIPTextConfig(**small, hidden_size=768, num_attention_heads=12, projection_dim=768)
    second = CLIPTextConfig(**small, hidden_size=1280, num_attention_heads=20, projection_dim=1280, eos_token_id=2)
    tokenizer = CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=[8, 8, 16, 16], norm_num_groups=4, latent_channels=4, **blocks),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return sum(one.numel() for one in unet.parameters())


def write_images(folder: Path, side: int, count: int = 8) -> None:
    """Images of noise with captions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}\n", encoding="utf-8")


def train(folder: Path, name: str, *options: str) -> subprocess.Popen[str]:
    """Start `sdcli train-unet` of all weights in float32."""
    command = [
        sys.executable,
        "-m",
        "sdcli",
        "train-unet",
        "data",
        "-m",
        "model",
        "-o",
        name.replace(" ", "-"),
        "--device",
        "cpu",
    ]
    command += [
        "--mixed-precision",
        "no",
        "--validation-split",
        "0",
        "--cache-dir",
        "cache",
        "--log-steps",
        "1",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=folder, env=environment)


def descendants(pid: int) -> Iterator[int]:
    """A process and its children's children, of Linux."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from descendants(int(child))


def measure(folder: Path, name: str, processes: str, sharding: str, options: list[str]) -> dict[str, Any]:
    """One run: its forecast, the highest memory of a process, the losses, and the seconds of its last step."""
    options = [*options, "--num-processes", processes, "--sharding", sharding]
    dry = train(folder, name, *options, "--dry-run", "--json")
    report, errors = dry.communicate()
    if dry.returncode:
        sys.exit(errors)
    forecast = json.loads(report)["memory_bytes_by_devices"][processes][sharding]
    with train(folder, name, *options) as run:
        highest: dict[int, int] = {}
        while run.poll() is None:
            for pid in descendants(run.pid):
                highest[pid] = max(highest.get(pid, 0), highest_memory(pid))
            time.sleep(0.2)
        if run.returncode:
            sys.exit(run.stderr.read() if run.stderr else "")
    records = [json.loads(line) for line in (folder / name.replace(" ", "-") / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return {
        "run": name,
        "forecast_gib": round(forecast / GIB, 2),
        "highest_gib": round(max(highest.values()) / GIB, 2),
        "losses": [record["loss"] for record in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels at the highest resolution (%(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="width and height of images (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights = write_model(folder / "model", chosen.width)
        write_images(folder / "data", chosen.resolution)
        runs = []
        for name in chosen.only:
            processes, sharding = RUNS[name]
            batch = ["--train-batch-size", "2" if processes == "1" else "1"]  # the same global batch
            options = [*batch, "--resolution", str(chosen.resolution), "--max-train-steps", str(chosen.steps)]
            runs.append(measure(folder, name, processes, sharding, options))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    result = {
        "machine": machine(),
        "width": chosen.width,
        "resolution": chosen.resolution,
        "weights": weights,
        "runs": runs,
    }
    print(json.dumps(result, indent=1))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    pairs = [zip(runs[0]["losses"], run["losses"], strict=True) for run in runs[1:]]
    sys.exit(any(abs(a - b) > 1e-5 * abs(a) for pair in pairs for a, b in pair))


if __name__ == "__main__":
    main()
