"""Parts about training: a step of train-unet, FSDP2, and the starter's recipe."""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_train import make_images
from rows import Contender, emit, in_turns, skipped

from sdcli.diffusion.pipeline import load_denoiser
from sdcli.models.registry import load_registry

ROOT = Path(__file__).resolve().parents[2]


def train(options: argparse.Namespace) -> None:
    training(options, ["sdcli"] if options.miniature else ["bare", "sdcli", "diffusers-cached"])


def train_compile(options: argparse.Namespace) -> None:
    if options.device != "cuda":
        emit(skipped("sdcli, --compile", "it needs a CUDA device"))
        return
    training(options, ["sdcli"], "--compile")


def training(options: argparse.Namespace, contenders: Sequence[str], *more: str) -> None:
    """scripts/bench_train.py: every contender in a process of its own."""
    shape = ["tiny", "64", "2", "2", "no"] if options.miniature else ["random-sd15", "512", "16", "12", "bf16"]
    names = ("--model", "--resolution", "--batch", "--steps", "--precision")
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [
            sys.executable,
            str(ROOT / "scripts" / "bench_train.py"),
            "--rounds",
            "1",
            "--device",
            options.device,
        ]
        command += [word for pair in zip(names, shape, strict=True) for word in pair]
        command += ["--json", str(figures), *more, "--only", *contenders]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["bench_train.py failed"])[-1])
        results = json.loads(figures.read_text())["results"]
    first = next(iter(results.values()))["seconds"]
    emit(
        *(
            {
                "name": ", ".join((name, *more)),
                "step_s": one["seconds"],
                "ratio": first / one["seconds"],
                "samples_per_s": one["samples_per_second"],
                "peak_bytes": one["memory_bytes"],
            }
            for name, one in results.items()
        )
    )


def fsdp(options: argparse.Namespace) -> None:
    """One training step of the UNet: plain, and sharded by torch's fully_shard over a group of one process."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    cuda = options.device == "cuda"
    model, size, batch = ("tiny", 64, 1) if options.miniature else ("random-sd15", 512, 8)
    loaded = load_denoiser(load_registry().find(model), device=options.device, dtype="float32", parts=["unet"])
    device, half = loaded.device, torch.bfloat16
    width, channels = loaded.unet.config.cross_attention_dim, loaded.unet.config.in_channels
    x = torch.randn(batch, channels, size // 8, size // 8, device=device)
    states = torch.randn(batch, 77, width, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)

    def step_of(unet: Any, *, autocast: bool) -> Contender:
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)

        def step() -> None:
            with torch.autocast(device.type, half, enabled=autocast and cuda):
                output = unet(x, t, states, return_dict=False)[0]
            torch.nn.functional.mse_loss(output.float(), x).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def sharded() -> Contender:
        unet = copy.deepcopy(loaded.unet).train().requires_grad_(True)
        mesh = init_device_mesh(device.type, (1,))
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32) if cuda else MixedPrecisionPolicy()
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(unet, mesh=mesh, mp_policy=policy)
        return step_of(unet, autocast=False)

    def plain() -> Contender:
        return step_of(copy.deepcopy(loaded.unet).train().requires_grad_(True), autocast=True)

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "nccl" if cuda else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            for name, make in (("one process, autocast", plain), ("one process, fully_shard", sharded)):
                # one after the other: the states of both optimizers would count as the peak of each
                in_turns({name: make}, device, rounds=1 if options.miniature else 8, per={"step_s": 1})
                if cuda:
                    torch.cuda.empty_cache()
        finally:
            distributed.destroy_process_group()


def starter(options: argparse.Namespace) -> None:
    """The recipe of the starter for GPUs: on its own data in WORK, else its UNet's settings on images of noise."""
    if options.starter_work is not None and not options.miniature:
        recipe(options)
        return
    settings = ROOT / "recipes" / "starter" / ("mini" if options.miniature else "gpu") / "unet-1.toml"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_images(work / "images", 32 if options.miniature else 128, count=16 if options.miniature else 2048)
        command = [sys.executable, "-m", "sdcli", "train-unet", str(work / "images"), "-o", str(work / "run")]
        command += ["--config", str(settings), "--device", options.device, "--cache-dir", str(work / "cache")]
        command += ["--sample-every-n-steps", str(10**9), "--validation-steps", str(10**9), "--log-steps", "1"]
        command += ["--validation-split", "0", "--quiet"]
        if options.device == "cpu":
            command += ["--mixed-precision", "no"]
        if not options.miniature:
            command += ["--max-hours", f"{max(10.0, min(options.seconds - 30, 60)) / 3600:.5f}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["train-unet failed"])[-1])
        from sdcli.training.run_log import read_log

        steps = read_log(work / "run").of("train")
    warm = steps[len(steps) // 4 :]
    emit(
        {
            "name": f"{settings.relative_to(ROOT)}, images of noise",
            "step_s": statistics.median(entry["seconds"] for entry in warm),
            "samples_per_s": statistics.median(entry["samples_per_second"] for entry in warm),
            "peak_bytes": steps[-1].get("memory_bytes"),
            "steps": len(steps),
            "last_loss": steps[-1]["loss"],
        }
    )


def recipe(options: argparse.Namespace) -> None:
    """Go on with recipes/starter/gpu in WORK for the time that is left; each call continues the one before."""
    minutes = max(0.5, (options.seconds - 20) / 60)
    script = ROOT / "scripts" / "starter" / "train.py"
    command = [sys.executable, str(script), str(options.starter_work), "--recipe", str(ROOT / "recipes/starter/gpu")]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--max-minutes", f"{minutes:.2f}"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    finished = sorted(path.name for path in (options.starter_work / "done").glob("*"))
    emit(
        {
            "name": "recipes/starter/gpu",
            "seconds": time.perf_counter() - started,
            "steps finished": ", ".join(finished) or "none",
        }
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["train.py failed"])[-1])
