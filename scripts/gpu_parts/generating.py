"""Parts about generating: parity in half precision, denoising, and the VAE."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Contender, Row, emit, in_turns, needs_cuda

from sdcli.diffusion.pipeline import Pipeline, load_denoiser
from sdcli.diffusion.sampling import sample
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.request.schedulers import SCHEDULERS, schedulers_for
from sdcli.request.schema import GenerationRequest, ResolvedRequest
from sdcli.vae.autoencoder import cell, initial_noise

PROMPT = "an astronaut riding a horse"
WARM_UP = 2
"""Denoising steps before a contender is measured."""


def requests_for(pipeline: Pipeline, *, batch: int, **fields: Any) -> list[ResolvedRequest]:
    return [
        resolve(GenerationRequest(prompt=PROMPT, seed=seed, **fields), pipeline.model.spec) for seed in range(batch)
    ]


def denoised(pipeline: Pipeline, requests: Sequence[ResolvedRequest]) -> torch.Tensor:
    """The latents [B, C, h, w] that sdcli generates."""
    latents = None
    for step in sample(pipeline, requests):
        latents = step.latents
    assert latents is not None
    return latents


class Reference:
    """diffusers' pipeline around a UNet, with the text states, the noise and the seeds of sdcli's requests."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[ResolvedRequest], unet: Any = None) -> None:
        import diffusers

        model, first = pipeline.model, requests[0]
        self.model, self.requests, self.steps = model, requests, first.steps
        self.guidance = float(first.guidance_scale)  # type: ignore[arg-type]
        with torch.inference_mode():
            inputs = pipeline.encode(requests, guided=True, steps=first.steps).at(1).inputs
        # tensors of inference mode cannot be saved for a backward pass, nor captured twice
        self.states = {name: rows.clone().chunk(2) for name, rows in inputs.items()}
        shape = pipeline.space.shape(width=first.width, height=first.height)
        self.noise = initial_noise([torch.Generator().manual_seed(request.seed) for request in requests], shape)
        kind = diffusers.StableDiffusionXLPipeline if "text_embeds" in inputs else diffusers.StableDiffusionPipeline
        absent = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
        if kind is diffusers.StableDiffusionXLPipeline:
            absent |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        else:
            absent |= {"safety_checker": None, "requires_safety_checker": False}  # type: ignore[dict-item]
        scheduler = make_scheduler(first.scheduler, model.scheduler_config)
        self.pipe = kind(vae=model.vae, unet=model.unet if unet is None else unet, scheduler=scheduler, **absent)
        self.pipe.set_progress_bar_config(disable=True)

    def warm_up(self) -> None:
        self(steps=WARM_UP)

    def __call__(self, *, steps: int | None = None) -> torch.Tensor:
        """The latents [B, C, h, w] that diffusers generates."""
        pipe, first = self.pipe, self.requests[0]
        pipe.scheduler = make_scheduler(first.scheduler, self.model.scheduler_config)
        generators = [torch.Generator().manual_seed(request.seed) for request in self.requests]
        for generator, noise in zip(generators, self.noise, strict=True):  # where drawing the first noise leaves them
            torch.randn((1, *noise.shape), generator=generator)
        negative, positive = self.states["encoder_hidden_states"]
        states = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        if "text_embeds" in self.states:
            negative_pooled, pooled = self.states["text_embeds"]
            states |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        states = {name: rows.to(pipe.unet.dtype) for name, rows in states.items()}
        latents = self.noise.to(self.model.device, pipe.unet.dtype)
        result: torch.Tensor = pipe(
            **states, latents=latents, width=first.width, height=first.height, num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance, generator=generators, output_type="latent",
        ).images  # fmt: skip
        return result


class Sampling:
    """sdcli's denoising, as a contender."""

    def __init__(self, pipeline: Pipeline, *, batch: int, **fields: Any) -> None:
        self.pipeline = pipeline
        self.requests = requests_for(pipeline, batch=batch, **fields)
        self.short = requests_for(pipeline, batch=batch, **{**fields, "steps": WARM_UP})

    def warm_up(self) -> None:
        denoised(self.pipeline, self.short)

    def __call__(self) -> torch.Tensor:
        return denoised(self.pipeline, self.requests)


# Parity


def parity(options: argparse.Namespace) -> None:
    """How far sdcli's latents are from diffusers' in half precision, beside what half precision itself changes."""
    torch.backends.cudnn.allow_tf32 = False  # TF32 rounds as coarsely as float16
    models = ["tiny"] if options.miniature else ["tiny", "starter", "random-sd15"]
    dtypes = ["bfloat16"] if options.device == "cpu" else ["float16", "bfloat16"]  # float16 does not work on the CPU
    for model in models:
        few = model == "random-sd15" or options.miniature
        names = ["ddim", "euler-a", "dpmpp-2m"] if few else schedulers_for("diffusion")
        spec = load_registry().find(model)
        exact = Pipeline.of(load_denoiser(spec, device=options.device, dtype="float32"))
        for dtype in dtypes:
            half = Pipeline.of(load_denoiser(spec, device=options.device, dtype=dtype))
            for name in names:
                emit(parity_row(f"{model}, {dtype}, {name}", exact, half, name, options))


def parity_row(name: str, exact: Pipeline, half: Pipeline, scheduler: str, options: argparse.Namespace) -> Row:
    """Root mean squares of the differences, relative to the standard deviation of the latents in float32."""
    steps = 2 if options.miniature else 10
    size = {} if exact.model.spec.name != "random-sd15" else {"width": 512, "height": 512}
    settings = {"scheduler": scheduler, "steps": steps, "guidance_scale": 3.0, **size}
    requests = requests_for(half, batch=2, **settings)
    with float32_noise(scheduler):
        ours = denoised(half, requests).float()
        theirs = Reference(half, requests)().float()
        truth = Reference(exact, requests_for(exact, batch=2, **settings))().float()
    scale = float(truth.std())

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().mean().sqrt()) / scale

    return {
        "name": name,
        "error": distance(ours, theirs),
        "rounding": distance(theirs, truth),
        "own_rounding": distance(ours, truth),
        "max_error": float((ours - theirs).abs().max()) / scale,
    }


@contextlib.contextmanager
def float32_noise(scheduler: str) -> Iterator[None]:
    """Let diffusers' schedulers draw fresh noise in float32, as sdcli does; half precision draws other numbers."""
    module = sys.modules[type(make_scheduler(scheduler, {})).__module__]
    before = getattr(module, "randn_tensor", None)
    if before is None or not SCHEDULERS[scheduler].stochastic:
        yield
        return

    def randn_tensor(*arguments: Any, dtype: Any = None, **more: Any) -> torch.Tensor:
        noise: torch.Tensor = before(*arguments, dtype=torch.float32, **more)
        return noise.to(dtype)

    module.randn_tensor = randn_tensor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = before  # type: ignore[attr-defined]


# Generating


def sd15_batch1(options: argparse.Namespace) -> None:
    generating(options, model="random-sd15", size=512, batch=1, steps=50, rounds=3, compiled=True)


def sd15_batch16(options: argparse.Namespace) -> None:
    generating(options, model="random-sd15", size=512, batch=16, steps=50, rounds=2)


def sdxl(options: argparse.Namespace) -> None:
    generating(options, model="random-sdxl", size=1024, batch=1, steps=30, rounds=2)


def generating(
    options: argparse.Namespace, *, model: str, size: int, batch: int, steps: int, rounds: int, compiled: bool = False
) -> None:
    """Denoising alone, guided: sdcli and diffusers on the same weights, and what compiling would bring."""
    spec = load_registry().find(model)
    if options.miniature:
        size, batch, steps, rounds = 64, min(batch, 2), 2, 1
        spec = miniature_of(spec)
    # on a CPU in float32: without bfloat16 kernels torch takes a hundred times as long
    dtype = "float16" if options.device == "cuda" else "float32"
    pipeline = Pipeline.of(load_denoiser(spec, device=options.device, dtype=dtype))
    device, unet = pipeline.model.device, pipeline.model.unet
    fields = {"width": size, "height": size, "steps": steps, "guidance_scale": 7.5, "scheduler": "ddim"}
    requests = requests_for(pipeline, batch=batch, **fields)

    def copied(layout: torch.memory_format) -> Any:
        return copy.deepcopy(unet).to(memory_format=layout)

    def compiled_blocks() -> Contender:
        needs_cuda(device)
        other = copied(torch.channels_last)
        other.compile_repeated_blocks(fullgraph=True)
        return Reference(pipeline, requests, other)

    def compiled_whole() -> Contender:
        needs_cuda(device)
        return Reference(pipeline, requests, torch.compile(copied(torch.channels_last)))

    def graphed() -> Contender:
        needs_cuda(device)
        return Reference(pipeline, requests, CudaGraph(copied(torch.channels_last)))

    contenders: dict[str, Callable[[], Contender]] = {
        "diffusers": lambda: Reference(pipeline, requests, copied(torch.contiguous_format)),
        f"sdcli, {dtype}": lambda: Sampling(pipeline, batch=batch, **fields),
        "diffusers, channels_last": lambda: Reference(pipeline, requests, copied(torch.channels_last)),
        "diffusers, UNet as a CUDA graph by this script": graphed,
    }
    if compiled:
        contenders["diffusers, transformer blocks compiled by this script"] = compiled_blocks
        contenders["diffusers, whole UNet compiled by this script"] = compiled_whole
    in_turns(contenders, device, rounds=rounds, per={"step_s": steps, "image_s": batch})


def miniature_of(spec: ModelSpec) -> ModelSpec:
    """A model of the same family with tiny networks."""
    if spec.family.name != "sdxl":
        return load_registry().find("tiny")
    from tests.tiny import save_tiny_sdxl

    folder = tempfile.TemporaryDirectory(prefix="sdcli-bench-")
    atexit.register(folder.cleanup)
    return spec_of_folder(save_tiny_sdxl(Path(folder.name) / "sdxl"))


class CudaGraph(torch.nn.Module):
    """A UNet whose kernels are recorded once as a CUDA graph for one shape of inputs, and replayed."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype
        self.add_embedding = getattr(unet, "add_embedding", None)
        self._graph: Any = None

    @torch.no_grad()
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        added = more.get("added_cond_kwargs") or {}
        given = (sample, timestep, encoder_hidden_states, *added.values())
        if self._graph is None:
            self._inputs = [value.clone() for value in given]
            keyed = dict(zip(added, self._inputs[3:], strict=True)) or None
            call = lambda: self.unet(*self._inputs[:3], added_cond_kwargs=keyed, return_dict=False)  # noqa: E731
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = call()
        for own, value in zip(self._inputs, given, strict=True):
            own.copy_(value)
        self._graph.replay()
        return (self._output[0].clone(),)


# The VAE


def vae(options: argparse.Namespace) -> None:
    """Decoding and encoding, beside diffusers' own calls; sdcli encodes images one by one, by design."""
    model = "tiny" if options.miniature else "random-sd15"
    dtype = "float16" if options.device == "cuda" else "float32"
    pipeline = Pipeline.of(load_denoiser(load_registry().find(model), device=options.device, dtype=dtype))
    plain: Any = copy.deepcopy(pipeline.model.vae).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for size, batch in [(32, 1)] if options.miniature else [(512, 1), (512, 8), (1024, 1)]:
        vae_rows(pipeline, plain, size=size, batch=batch, rounds=1 if options.miniature else 5)


def vae_rows(pipeline: Pipeline, plain: Any, *, size: int, batch: int, rounds: int) -> None:
    device, space = pipeline.model.device, pipeline.space
    shape = space.shape(width=size, height=size)
    latents = initial_noise([torch.Generator().manual_seed(n) for n in range(batch)], shape).to(device)
    pixels = torch.rand((batch, 3, shape[1] * cell(plain), shape[2] * cell(plain)))
    generators = [torch.Generator().manual_seed(n) for n in range(batch)]

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        inputs = latents.to(plain.dtype) / plain.config.scaling_factor
        output: torch.Tensor = plain.decode(inputs, return_dict=False)[0].float().cpu()
        return output

    @torch.inference_mode()
    def encode() -> torch.Tensor:
        output: torch.Tensor = plain.encode((pixels * 2 - 1).to(device, plain.dtype)).latent_dist.mean.float().cpu()
        return output

    def own_encode() -> torch.Tensor:
        copies = [one.clone() for one in pixels]  # sdcli remembers the tensors that it has encoded
        return space.encode(copies, generators)

    for what, theirs, ours in (("decode", decode, lambda: space.decode(latents)), ("encode", encode, own_encode)):
        of = f"{what} {batch} of {size}x{size}"
        contenders = {f"{of}, diffusers": partial(_same, theirs), f"{of}, sdcli": partial(_same, ours)}
        in_turns(contenders, device, rounds=rounds, per={"seconds": 1, "image_s": batch})


def _same(contender: Contender) -> Contender:
    """A factory of a contender that needs no preparation."""
    return contender
