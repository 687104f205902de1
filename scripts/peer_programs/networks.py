"""The programs that run torch: sdcli and diffusers; and the floor, the rate that this machine can reach."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from peer_programs.common import DECODE, MODEL, STEP, Call, Figures, guide, inputs, timed


def networks_of(arguments: argparse.Namespace, load: Callable[..., Any], *parts: str) -> Any:
    """The model in memory: its `parts`, or the networks that the measured parts need."""
    from sdcli.models.registry import load_registry

    needed = {"unet", *parts} if parts else {"unet", *(["vae"] if DECODE in arguments.parts else [])}
    left_out = {"unet", "vae", "text_encoder"} - needed
    return load(load_registry().find(MODEL), device="cpu", dtype="float32", leave_out=left_out)


def plain_model(arguments: argparse.Namespace, *parts: str) -> Any:
    """diffusers' networks without anything that sdcli does to make them quick."""
    from sdcli.models import loader

    loader.keep_freed_memory = lambda **_: None
    return networks_of(arguments, loader.load_model, *parts)


def run_sdcli(arguments: argparse.Namespace) -> Figures:
    from sdcli.io.threads import wait_without_spinning

    wait_without_spinning()
    started = time.perf_counter()
    import torch

    import sdcli
    from sdcli.diffusion.pipeline import load_denoiser

    torch.set_num_threads(arguments.threads)
    model = networks_of(arguments, load_denoiser)
    with torch.inference_mode():
        return timed(arguments, torch_calls(arguments, model), started=started, version=sdcli.__version__)


def run_diffusers(arguments: argparse.Namespace) -> Figures:
    """diffusers' networks as they are after loading; the allocator and the threads' waiting as torch has them."""
    started = time.perf_counter()
    import diffusers
    import torch

    torch.set_num_threads(arguments.threads)
    model = plain_model(arguments)
    with torch.inference_mode():
        return timed(arguments, torch_calls(arguments, model), started=started, version=diffusers.__version__)


def torch_calls(arguments: argparse.Namespace, model: Any) -> dict[str, Call]:
    given = inputs(arguments.size)
    return {
        STEP: lambda: guide(model.unet(given["x"], given["t"], given["states"]).sample),
        DECODE: lambda: model.vae.decode(given["latents"]).sample,
    }


def traced_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """For converters: the name of a part, a module of tensors only, and its inputs."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Any, t: Any, states: Any) -> Any:
            return self.unet(x, t, states, return_dict=False)[0]

    class Decode(nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: Any) -> Any:
            return self.vae.decode(latents, return_dict=False)[0]

    model, given = plain_model(arguments), inputs(arguments.size)
    decoded = {"latents": given.pop("latents")}
    with torch.no_grad():
        if STEP in arguments.parts:
            yield STEP, Step(model.unet).eval(), given
        if DECODE in arguments.parts:
            yield DECODE, Decode(model.vae).eval(), decoded


def run_floor(arguments: argparse.Namespace) -> Figures:
    """The best rate of products of large float32 matrices, and the operations of a guided step and of a decode."""
    import torch

    torch.set_num_threads(arguments.threads)
    rates = []
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(8):
            begun = time.perf_counter()
            a @ b
            rates.append(2 * size**3 / (time.perf_counter() - begun) / 1e9)
    return {"gflops": max(rates), **operations(arguments)}


def operations(arguments: argparse.Namespace) -> dict[str, float]:
    """TFLOP of both parts, counted once on tensors without data; a multiplication with its addition is two."""
    kept = arguments.work / f"operations-{arguments.size}.json"
    if not kept.exists():
        kept.write_text(json.dumps(count_operations(arguments)))
    counted: dict[str, float] = json.loads(kept.read_text())
    return counted


def count_operations(arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from sdcli.models.registry import load_registry

    spec = load_registry().find(MODEL)
    configs = spec.family.recipes[spec.source.architecture]()
    counted, given = {}, {name: tensor.to("meta") for name, tensor in inputs(arguments.size).items()}
    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet2DConditionModel.from_config(configs["unet"]), AutoencoderKL.from_config(configs["vae"])
        calls = {
            STEP: lambda: unet(given["x"], given["t"], given["states"]),
            DECODE: lambda: vae.decode(given["latents"]),
        }
        for part, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counted[f"{part}_tflop"] = counter.get_total_flops() / 1e12
    return counted
