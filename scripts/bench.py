#!/usr/bin/env python3
"""Compare the time and memory of sdcli with diffusers, by default and tuned by hand, on the same weights in one run.

Each contender runs in a process of its own, in turns, so that a busy machine slows all alike; the figures are the
medians over the rounds. Compare the ratios: the seconds depend on the machine.

    python scripts/bench.py                              # random-sd15, 512x512, on CUDA if available, else the CPU
    python scripts/bench.py --model starter --steps 20 --json docs/bench/starter.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

CONTENDERS = {
    "sdcli": "sdcli, dtype auto",
    "sdcli-float32": "sdcli, float32",
    "default": "diffusers by default (float32)",
    "half": "diffusers in sdcli's dtype",
    "tuned": "diffusers in sdcli's dtype, channels_last",
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contenders}
    for number in range(arguments.rounds):
        for name in arguments.contenders:
            print(f"round {number + 1}: {CONTENDERS[name]} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rounds[name].append(json.loads(output.splitlines()[-1]))
    result = summary(rounds, arguments)
    show(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-sd15", help="a registered model or a diffusers folder (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="image width and height in pixels (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed denoising steps, after one warm-up step (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images per batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--machine", default="", help="name of the machine in the output")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process: seconds to load, per guided step and to decode, and the peak memory."""
    contender = arguments.worker
    started = time.perf_counter()
    import torch

    from sdcli.diffusion.pipeline import load_denoiser
    from sdcli.models import loader
    from sdcli.models.registry import load_registry

    spec = load_registry().find(arguments.model)
    plain = contender in ("default", "sdcli-float32")
    dtype = "float32" if plain else "auto"
    times = run_sdcli if contender.startswith("sdcli") else run_diffusers
    if times is run_diffusers:
        loader.keep_freed_memory = lambda **_: None  # sdcli's own tuning of the allocator
    load = load_denoiser if times is run_sdcli else loader.load_model
    model = load(spec, device=arguments.device, dtype=dtype)
    loaded = time.perf_counter() - started
    steps, decode = times(model, arguments)
    cuda = model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(p.numel() * p.element_size() for part in model.parts.values() for p in part.parameters())
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "load_s": loaded,
        "step_s": statistics.median(steps),
        "decode_s": decode,
        "peak_bytes": peak,
        "weight_bytes": weights,
    }


def run_sdcli(model: Any, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each step and of decoding, with sdcli's own pipeline."""
    from sdcli.diffusion.pipeline import Pipeline
    from sdcli.diffusion.sampling import sample
    from sdcli.generation.resolve.resolve import resolve
    from sdcli.request.schema import GenerationRequest

    pipeline = Pipeline.of(model)
    request = GenerationRequest(
        prompt="an astronaut riding a horse",
        width=arguments.size,
        height=arguments.size,
        steps=arguments.steps + 1,
        guidance_scale=7.5,
        scheduler="ddim",
        seed=0,
    )
    ticks, latents = [], None
    for step in sample(pipeline, [resolve(request, model.spec)] * arguments.batch):
        wait(model.device)
        ticks.append(time.perf_counter())
        latents = step.latents
    pipeline.space.decode(latents[:1])
    started = time.perf_counter()
    for image in latents:
        pipeline.space.decode(image[None])
    return differences(ticks), time.perf_counter() - started


def run_diffusers(model: Any, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each step and of decoding, with StableDiffusionPipeline and the same networks."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    from sdcli.diffusion.scheduler_factory import make_scheduler

    model.unet.set_attn_processor(AttnProcessor2_0())  # diffusers' default; sdcli uses another in half precision
    layout = torch.channels_last if arguments.worker == "tuned" else torch.contiguous_format
    pipeline = StableDiffusionPipeline(
        vae=model.vae.to(memory_format=layout),
        unet=model.unet.to(memory_format=layout),
        text_encoder=None,
        tokenizer=None,
        scheduler=make_scheduler("ddim", model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    width = model.text_encoder.config.hidden_size
    hidden = torch.randn(1, 77, width, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    hidden = hidden.expand(arguments.batch, -1, -1)
    ticks: list[float] = []

    def tick(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        wait(model.device)
        ticks.append(time.perf_counter())
        return values

    latents = pipeline(
        prompt_embeds=hidden,
        negative_prompt_embeds=hidden,
        height=arguments.size,
        width=arguments.size,
        num_inference_steps=arguments.steps + 1,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(0)] * arguments.batch,
        output_type="latent",
        callback_on_step_end=tick,
    ).images
    with torch.inference_mode():
        scaled = latents / pipeline.vae.config.scaling_factor
        pipeline.vae.decode(scaled[:1])
        wait(model.device)
        started = time.perf_counter()
        pipeline.image_processor.postprocess(pipeline.vae.decode(scaled).sample, output_type="np")
    return differences(ticks), time.perf_counter() - started


def wait(device: Any) -> None:
    """Wait until the device is idle: CUDA kernels run asynchronously."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def differences(ticks: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(ticks)]


def summary(rounds: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians per contender, with the facts of the run."""
    import diffusers
    import torch

    medians = {
        name: {
            key: statistics.median(run[key] for run in runs) if isinstance(runs[0][key], (int, float)) else runs[0][key]
            for key in runs[0]
        }
        for name, runs in rounds.items()
    }
    return {
        "machine": arguments.machine or platform.processor() or platform.machine(),
        "model": arguments.model,
        "size": arguments.size,
        "batch": arguments.batch,
        "guided": True,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "contenders": medians,
    }


def show(result: dict[str, Any]) -> None:
    contenders = result["contenders"]
    base = contenders.get("default") or next(iter(contenders.values()))
    print(f"{result['model']}, {result['size']}x{result['size']}, batch {result['batch']}, guided; {result['machine']}")
    print(f"{'':44}{'step':>9}{'ratio':>8}{'decode':>9}{'ratio':>8}{'load':>8}{'peak':>9}{'over weights':>14}")
    for name, figures in contenders.items():
        over = figures["peak_bytes"] - figures["weight_bytes"]
        print(
            f"{CONTENDERS[name] + ' [' + figures['dtype'] + ']':44}"
            f"{figures['step_s']:8.3f}s{base['step_s'] / figures['step_s']:7.2f}x"
            f"{figures['decode_s']:8.3f}s{base['decode_s'] / figures['decode_s']:7.2f}x"
            f"{figures['load_s']:7.1f}s{figures['peak_bytes'] / 1e9:6.2f} GB{over / 1e9:11.2f} GB"
        )


if __name__ == "__main__":
    main()
