#!/usr/bin/env python3
"""Measure the cost of features of `generate`: one image with each, in turns with a plain one, in one warm process.

Compare the ratios: the seconds depend on the machine. On a CPU they are CPU time, which other processes hardly change.
Sampling, decoding and saving are included, loading the model is not; init images, LoRAs and ControlNets are loaded
once, in a first round that is not counted.

    python scripts/bench_features.py                                        # the starter at its own size and steps
    python scripts/bench_features.py --model random-sd15 --size 256 --steps 8 --json docs/bench/features-sd15.json
    python scripts/bench_features.py --quality --steps 20 --sheet quality.png    # time beside PSNR, 12 prompts
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

PROMPT = "a red car and a green tree"
LONG = ", ".join([PROMPT] * 8)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance (scale 1)": {"guidance_scale": 1},
    "--init-image, strength 1": {"init_image": "start.png", "strength": 1},
    "--init-image, strength 0.5": {"init_image": "start.png", "strength": 0.5},
    "--mask": {"init_image": "start.png", "mask": "mask.png"},
    "--upscale 2x:0.5": {"upscale": "2x:0.5"},
    "--upscale 2x:0.5:latent": {"upscale": "2x:0.5:latent"},
    "--variation-strength": {"variation_strength": 0.3, "variation_seed": 5},
    "a weight": {"prompt": PROMPT.replace("red", "(red:1.4)")},
    "another prompt at each step": {"prompt": PROMPT.replace("red", "[red|blue]")},
    "a long prompt": {"prompt": LONG},
    "AND of two prompts": {"prompt": PROMPT.replace(" and ", " AND ")},
    "--clip-skip 2": {"clip_skip": 2},
    "--embedding": {"prompt": f"{PROMPT}, thing", "embeddings": ["thing.safetensors"]},
    "--lora": {"loras": ["lora.safetensors"]},
    "--guidance-rescale": {"guidance_rescale": 0.7},
    "--guidance-scale 7..3": {"guidance_scale": "7..3"},
    "--guidance-interval 0.2-0.8": {"guidance_interval": "0.2-0.8"},
    "--reuse 2": {"reuse": 2},
    "--reuse 3": {"reuse": 3},
    "--reuse 5": {"reuse": 5},
    "--pag-scale": {"pag_scale": 3},
    "--control": {"controls": ["./controlnet=mask.png"]},
    "two --control": {"controls": ["./controlnet=mask.png", "./controlnet=start.png"]},
    "--control @0-0.5": {"controls": ["./controlnet=mask.png@0-0.5"]},
    "--trace 8": {},
    "--heatmap all": {},
    "--preview FILE": {},
    "--watermark": {"watermark": "sdcli"},
}


QUALITY: dict[str, dict[str, Any]] = {
    "plain": {},
    "--reuse 2": {"reuse": 2},
    "--reuse 3": {"reuse": 3},
    "--reuse 5": {"reuse": 5},
    "--guidance-interval 0.2-0.8": {"guidance_interval": "0.2-0.8"},
    "--guidance-interval 0.3-1": {"guidance_interval": "0.3-1"},
    "1/2 of the steps": {"share": 1 / 2},
    "1/3 of the steps": {"share": 1 / 3},
    "1/5 of the steps": {"share": 1 / 5},
}
"""What changes an image and saves time; `share` is of the steps."""
PROMPTS = (
    *("a red fox", "a yellow banana", "a blue car", "a cat with a hat", "a green tree", "a slice of pizza"),
    *("a house in the snow", "a violin", "a smiling sun", "an open book", "a penguin", "a bicycle"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter", help="a registered model or a diffusers folder (%(default)s)")
    parser.add_argument("--size", type=int, help="image width and height in pixels (default: the model's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--rounds", type=int, default=3, help="images with each feature (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", nargs="+", metavar="FEATURE", help="measure only these, and plain")
    parser.add_argument("--machine", default="", help="name of the machine in the output")
    parser.add_argument("--quality", action="store_true", help="measure time and PSNR of quicker ways instead")
    parser.add_argument("--sheet", type=Path, help="with --quality, also write a contact sheet of the images")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.quality:
        measure_quality(arguments)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        seconds = measure_features(arguments)
    plain = seconds["plain"]
    rows = {}
    for name, times in seconds.items():
        ratios = [one / base for one, base in zip(times, plain, strict=True)]
        rows[name] = {"seconds": statistics.median(times), "ratio": statistics.median(ratios)}
        print(f"{name:30} {rows[name]['seconds']:8.3f} s {rows[name]['ratio']:6.2f}")
    if arguments.json:
        left_out = ("json", "only", "quality", "sheet")
        facts = {name: value for name, value in vars(arguments).items() if name not in left_out}
        arguments.json.write_text(json.dumps({**facts, "features": rows}, indent=2) + "\n")


def measure_features(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Feature -> seconds of each round; writes files into the current folder."""
    import torch

    from sdcli.cli.ui.preview import Preview, to_file
    from sdcli.diffusion.input_images import measure
    from sdcli.generation.events import Progress, Result
    from sdcli.generation.model_cache import ModelCache
    from sdcli.generation.resolve.jobs import ResolvedJob
    from sdcli.generation.resolve.resolve import resolve
    from sdcli.generation.service import generate
    from sdcli.generation.settings import OutputSettings, RunSettings, TraceSettings
    from sdcli.generation.writer import Writer
    from sdcli.models.registry import load_registry
    from sdcli.request.schema import parse_request

    registry = load_registry()
    spec = registry.find(arguments.model)
    output = OutputSettings(outdir=Path(), template="image.png", overwrite=True)
    cache = ModelCache(RunSettings(device=arguments.device, dtype=arguments.dtype))
    plain = resolve(parse_request({"model": arguments.model, "prompt": PROMPT}), spec)
    with cache.lease(ResolvedJob(1, plain, spec)) as lease:
        pipeline = lease.pipeline
    size = arguments.size or spec.defaults.width
    fields = {"model": arguments.model, "prompt": PROMPT, "seed": 1, "size": f"{size}x{size}"}
    fields |= {"steps": arguments.steps} if arguments.steps else {}
    make_files(pipeline.model, size)
    clock = time.process_time if pipeline.model.device.type == "cpu" else time.perf_counter

    def turn(name: str) -> float:
        request = resolve(parse_request({**fields, **FEATURES[name]}), spec, measure=measure)
        settings = replace(
            output,
            trace=TraceSettings.of("8", "webp") if name.startswith("--trace") else None,
            heatmap=() if name.startswith("--heatmap") else None,
        )
        preview = Preview(to_file(Path("preview.png")), warn=print) if name.startswith("--preview") else None
        began = clock()
        for event in generate([ResolvedJob.of(1, request, registry)], cache, Writer(settings)):
            if isinstance(event, Progress) and preview is not None:
                preview.step(event)
            elif isinstance(event, Result) and event.error is not None:
                raise event.error
        if pipeline.model.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    names = [name for name in FEATURES if not arguments.only or name == "plain" or name in arguments.only]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds + 1):
        for name in names:
            if name == "--lora":
                turn(name)  # merges the LoRA, so that the next turn finds it warm
            took = turn(name)
            if number:
                seconds[name].append(took)
    return seconds


def measure_quality(arguments: argparse.Namespace) -> None:
    """Print what each way of saving time costs and saves, for an image of each prompt beside the plain one."""
    import torch

    from sdcli.generation.model_cache import ModelCache
    from sdcli.generation.resolve.jobs import ResolvedJob
    from sdcli.generation.resolve.resolve import resolve
    from sdcli.generation.service import generate_images
    from sdcli.generation.settings import RunSettings
    from sdcli.images.contact_sheet import contact_sheet
    from sdcli.images.pixels import from_pixels
    from sdcli.models.registry import load_registry
    from sdcli.request.schema import parse_request

    registry = load_registry()
    spec = registry.find(arguments.model)
    cache = ModelCache(RunSettings(device=arguments.device, dtype=arguments.dtype, batch_size=1))
    steps = arguments.steps or spec.defaults.steps
    size = {"size": f"{arguments.size}x{arguments.size}"} if arguments.size else {}

    def job(index: int, name: str) -> ResolvedJob:
        fields = {"model": arguments.model, "prompt": PROMPTS[index], "seed": index, "steps": steps, **size}
        fields |= QUALITY[name]
        fields["steps"] = max(1, round(steps * fields.pop("share", 1)))
        return ResolvedJob.of(index, resolve(parse_request(fields), spec), registry)

    seconds: dict[str, list[float]] = {name: [] for name in QUALITY}
    images: dict[str, list[torch.Tensor]] = {name: [] for name in QUALITY}
    with cache.lease(job(0, "plain")) as lease:
        clock = time.process_time if lease.pipeline.model.device.type == "cpu" else time.perf_counter
        generate_images(lease, [job(0, "plain")], cache.limits)
        for index in range(len(PROMPTS)):
            for name in QUALITY:
                began = clock()
                (made,) = generate_images(lease, [job(index, name)], cache.limits)
                seconds[name].append(clock() - began)
                images[name].append(made.pixels)
    rows = {}
    for name in QUALITY:
        ratios = [one / base for one, base in zip(seconds[name], seconds["plain"], strict=True)]
        psnr = [
            float(-10 * ((one - base) ** 2).mean().clamp_min(1e-12).log10())
            for one, base in zip(images[name], images["plain"], strict=True)
        ]
        rows[name] = {"ratio": statistics.median(ratios), "psnr": statistics.median(psnr), "worst_psnr": min(psnr)}
        print(f"{name:30} {rows[name]['ratio']:6.2f} {rows[name]['psnr']:6.1f} dB {rows[name]['worst_psnr']:6.1f} dB")
    if arguments.sheet:
        cells = [from_pixels(images[name][index]) for index in range(len(PROMPTS)) for name in QUALITY]
        labels = [name.removeprefix("--") for _ in PROMPTS for name in QUALITY]
        contact_sheet(cells, columns=len(QUALITY), labels=labels).save(arguments.sheet)
    if arguments.json:
        facts = {"model": arguments.model, "steps": steps, "prompts": len(PROMPTS), "machine": arguments.machine}
        arguments.json.write_text(json.dumps({**facts, "ways": rows}, indent=2) + "\n")


def make_files(model: Any, size: int) -> None:
    """Write an init image, a mask, and an embedding, LoRA and ControlNet of small random weights that fit the model."""
    import torch
    from diffusers import ControlNetModel
    from PIL import Image, ImageDraw
    from safetensors.torch import save_file

    Image.linear_gradient("L").resize((size, size)).convert("RGB").save("start.png")
    mask = Image.new("RGB", (size, size))
    ImageDraw.Draw(mask).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill="white")
    mask.save("mask.png")
    width = model.parts["text_encoder"].config.hidden_size
    save_file({"thing": 0.01 * torch.randn(2, width)}, "thing.safetensors")
    pairs = {}
    for name, layer in model.unet.named_modules():
        if name.endswith((".to_q", ".to_v")):
            pairs[f"unet.{name}.lora_A.weight"] = 0.01 * torch.randn(4, layer.in_features)
            pairs[f"unet.{name}.lora_B.weight"] = 0.01 * torch.randn(layer.out_features, 4)
    save_file(pairs, "lora.safetensors")
    ControlNetModel.from_unet(model.unet).save_pretrained("controlnet")


if __name__ == "__main__":
    main()
