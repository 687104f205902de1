#!/usr/bin/env python
"""Measure training: sdcli compared with diffusers' train_text_to_image loop, reproduced here, on the same work.

Each contender runs in a process of its own, in turns, on the same model, images, batch and precision:

  bare              forward, backward, clip and AdamW step on fixed tensors: the lower bound
  sdcli             `sdcli train-unet` from its cache of latents and text states, with its log
  diffusers-cached  the loop of diffusers' script on latents and text states held in memory
  diffusers         the loop unchanged: images loaded and encoded, captions encoded, in every step

Prints seconds per step (the median over the steps of all rounds), samples/s and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("bare", "sdcli", "diffusers-cached", "diffusers")
WARM_UP = 2
"""Uncounted steps at the start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter", help="a registered model or a folder (%(default)s)")
    parser.add_argument("--resolution", type=int, default=128, help="width and height in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="counted steps per round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender (%(default)s)")
    parser.add_argument(
        "--precision", choices=["no", "bf16", "fp16"], default="no", help="autocast dtype (%(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ema", action="store_true", help="keep a moving average of the weights")
    parser.add_argument("--rank", type=int, help="train a LoRA of this rank (sdcli and bare only)")
    parser.add_argument("--compile", action="store_true", help="torch.compile (sdcli only)")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--machine", default=platform.machine(), help="name of the machine in the output (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        seconds, memory = globals()[f"run_{options.contender.replace('-', '_')}"](options)
        print(json.dumps({"seconds": seconds, "memory": memory}))
        return
    with tempfile.TemporaryDirectory() as work:
        make_images(Path(work) / "images", options.resolution, count=max(8, 2 * options.batch))
        results = compare(options, Path(work))
    report(options, results)


def compare(options: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """Run every contender in turn, `rounds` times."""
    steps: dict[str, list[float]] = {name: [] for name in options.only}
    memory: dict[str, int] = {}
    for turn in range(options.rounds + 1):  # the first turn fills sdcli's cache and is not counted
        for name in options.only if turn else ["sdcli"] if "sdcli" in options.only else []:
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name, "--work", str(work)]
            command += ["--steps", "1"] if not turn else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            if turn:
                answer = json.loads(done.stdout.splitlines()[-1])
                steps[name] += answer["seconds"]
                memory[name] = max(memory.get(name, 0), answer["memory"])
                shown = statistics.median(answer["seconds"])
                print(f"round {turn} {name}: {shown:.3f} s per step", file=sys.stderr, flush=True)
    return {
        name: {
            "seconds": statistics.median(values),
            "samples_per_second": options.batch / statistics.median(values),
            "memory_bytes": memory[name],
            "steps": len(values),
        }
        for name, values in steps.items()
    }


def report(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    import torch

    work = f"{options.model} at {options.resolution}, batch {options.batch}, precision {options.precision}"
    print(f"{work}{', EMA' if options.ema else ''}{f', LoRA {options.rank}' if options.rank else ''}")
    for name, figures in results.items():
        ratio = f"{figures['seconds'] / results['sdcli']['seconds']:.2f} of sdcli's time" if "sdcli" in results else ""
        print(
            f"  {name:17} {figures['seconds']:8.3f} s/step {figures['samples_per_second']:8.2f} samples/s "
            f"{figures['memory_bytes'] / 2**30:6.1f} GiB  {ratio}"
        )
    if options.json:
        facts = {
            "machine": options.machine,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "options": {
                name: value
                for name, value in vars(options).items()
                if name
                in {"model", "resolution", "batch", "steps", "rounds", "precision", "device", "ema", "rank", "compile"}
            },
            "results": results,
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


def make_images(folder: Path, size: int, *, count: int) -> None:
    """Write images of noise with captions, slightly larger than the training resolution."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        small = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size + 40, size + 40)).save(folder / f"{number:04}.jpg", quality=92)
        (folder / f"{number:04}.txt").write_text(f"an image of thing number {number}")


# The contenders; each returns the seconds of each step and the peak memory in bytes


def run_sdcli(options: argparse.Namespace) -> tuple[list[float], int]:
    from sdcli.models.registry import load_registry
    from sdcli.training.events import StepMetrics
    from sdcli.training.unet.session import UnetSession
    from sdcli.training.unet.settings import UnetSettings

    never = 10**9
    settings = UnetSettings(
        model=options.model, resolution=str(options.resolution), train_batch_size=options.batch, device=options.device,
        max_train_steps=WARM_UP + options.steps, mixed_precision=options.precision, use_ema=options.ema,
        checkpointing_steps=never, sample_every_n_steps=never, validation_steps=never, validation_split=0.0,
        cache_dir=options.work / "cache", rank=options.rank, compile=options.compile,
        channels_last=options.device == "cuda", caption_dropout=0.1,
    )  # fmt: skip
    run = options.work / f"run-{os.getpid()}"
    with UnetSession(str(options.work / "images"), run, settings, load_registry()) as session:
        list(session.prepare(resume=False))
        seconds = []
        for event in session.train(stop=lambda: None):
            if isinstance(event, StepMetrics):
                seconds.append(event.seconds)
                if event.step == WARM_UP + options.steps:
                    break  # without the last checkpoint
    return seconds[WARM_UP:], peak(options.device)


def run_bare(options: argparse.Namespace) -> tuple[list[float], int]:
    import torch

    parts = Parts(options)
    unet, optimizer = parts.trainable()
    latents, hidden = parts.example()
    noise, times = torch.randn_like(latents), torch.randint(0, 1000, (options.batch,), device=latents.device)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)

    def step() -> None:
        with torch.autocast(options.device, half, enabled=half is not None):
            output = unet(latents, times, hidden, return_dict=False)[0]
        torch.nn.functional.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, options), peak(options.device)


def run_diffusers_cached(options: argparse.Namespace) -> tuple[list[float], int]:
    return _diffusers(options, cached=True)


def run_diffusers(options: argparse.Namespace) -> tuple[list[float], int]:
    return _diffusers(options, cached=False)


def _diffusers(options: argparse.Namespace, *, cached: bool) -> tuple[list[float], int]:
    """The inner loop of diffusers 0.42's examples/text_to_image/train_text_to_image.py, without its bookkeeping."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
    parts = Parts(options)
    unet, optimizer = parts.trainable()
    schedule = get_scheduler("constant", optimizer)
    ema = EMAModel(unet.parameters(), foreach=True) if options.ema else None
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    noise_scheduler = DDPMScheduler.from_config(dict(parts.scheduler_config))
    batches = parts.cached_batches() if cached else parts.loaded_batches()

    def step() -> None:
        batch = next(batches)
        with accelerator.accumulate(unet):
            if cached:
                latents, hidden = batch
            else:
                with torch.no_grad():
                    latents, hidden = parts.encode(*batch)
            noise = torch.randn_like(latents)
            times = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = noise_scheduler.add_noise(latents.float(), noise.float(), times)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents, noise, times)
            output = unet(noisy, times, hidden, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(options.batch)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())

    return timed(step, options), peak(options.device)


class Parts:
    """The same networks and images for every contender but sdcli, which loads its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        from sdcli.models.loader import load_model
        from sdcli.models.registry import load_registry

        self.options = options
        self.model = load_model(load_registry().find(options.model), device=options.device, dtype="float32")
        self.scheduler_config = self.model.scheduler_config

    def trainable(self) -> tuple[Any, Any]:
        """The UNet with gradients enabled, and AdamW over its parameters."""
        import torch

        unet: Any = self.model.unet.train()
        if self.options.rank:
            from sdcli.training.lora import LoraShape, add_lora

            add_lora(unet, LoraShape(self.options.rank, self.options.rank), seed=0)
        else:
            unet.requires_grad_(True)
        if self.options.device == "cuda":
            unet.to(memory_format=torch.channels_last)
        parameters = [p for p in unet.parameters() if p.requires_grad]
        return unet, torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, fused=True)

    def example(self) -> tuple[Any, Any]:
        """One batch of latents and text states."""
        return next(self.cached_batches())

    def encode(self, pixels: Any, ids: Any) -> tuple[Any, Any]:
        vae = self.model.vae
        encoded = vae.encode((pixels * 2 - 1).to(self.model.device))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
        return latents * vae.config.scaling_factor, self.model.text_encoder(ids.to(self.model.device))

    def loaded_batches(self) -> Any:
        """Batches from a DataLoader that loads, resizes and crops images and tokenizes captions."""
        from torch.utils.data import DataLoader

        while True:
            yield from DataLoader(self._dataset(), batch_size=self.options.batch, shuffle=True, drop_last=True)

    def cached_batches(self) -> Any:
        """The same batches, encoded once and held in memory."""
        import torch

        with torch.no_grad():
            items = [self._dataset()[index] for index in range(len(self._dataset()))]
            pairs = [self.encode(pixels[None], ids[None]) for pixels, ids in items]
        latents, hidden = (torch.cat(column) for column in zip(*pairs, strict=True))
        while True:
            for rows in torch.randperm(len(latents)).split(self.options.batch):
                if len(rows) == self.options.batch:
                    yield latents[rows], hidden[rows]

    def _dataset(self) -> Any:
        import torch
        from PIL import Image, ImageOps

        from sdcli.images.pixels import to_pixels

        files = sorted((self.options.work / "images").glob("*.jpg"))
        size, tokenizer = self.options.resolution, self.model.tokenizer

        class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> tuple[Any, Any]:
                image = ImageOps.fit(Image.open(files[index]).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
                assert tokenizer is not None
                return to_pixels(image), torch.tensor(tokenizer(files[index].with_suffix(".txt").read_text()).ids)

        return Images()


def timed(step: Any, options: argparse.Namespace) -> list[float]:
    """Run the steps; seconds of each counted one."""
    import torch

    seconds = []
    for _ in range(WARM_UP + options.steps):
        began = time.perf_counter()
        step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def peak(device: str) -> int:
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
