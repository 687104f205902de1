"""stable-diffusion.cpp, by its Python package.

The package makes whole images only. Its report of progress ends each step, so a step is the time between two reports;
it writes the seconds of a decode into its log. One process makes one image of `--repeats` and one more steps (the first
is not measured) and decodes once. In order to compare what it computes, sdcli's networks make the same image once, when
this program is prepared: the same weights, prompt, noise and sigmas, by Euler's method.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import re
import resource
import time
from pathlib import Path
from typing import Any

from peer_programs.common import DECODE, GUIDANCE, SEED, STEP, Figures, guide, output_file
from peer_programs.networks import plain_model

PROMPT = "an astronaut riding a horse"
CHECKPOINT = "sd15-f32.safetensors"
STARTS, ENDS = 0.00085, 0.012
"""The first and the last beta of Stable Diffusion 1.5."""


def schedule(steps: int) -> list[tuple[int, float]]:
    """Timesteps evenly spaced from the noisiest, each with its sigma. They are whole, so neither program rounds."""
    import numpy

    betas = numpy.linspace(STARTS**0.5, ENDS**0.5, 1000) ** 2
    kept = numpy.cumprod(1 - betas)
    sigmas = ((1 - kept) / kept) ** 0.5
    return [(t, float(sigmas[t])) for t in (999 - round(999 * step / steps) for step in range(steps))]


def image_file(arguments: argparse.Namespace, name: str) -> Path:
    return output_file(arguments, name, f"image-{arguments.repeats + 1}")


def prepare_sd_cpp(arguments: argparse.Namespace) -> None:
    """The weights as one checkpoint, in the names of the original code, and the image that sdcli's networks make."""
    import numpy
    import torch
    from safetensors.torch import save_file

    from tests.ldm import ldm_checkpoint

    model = plain_model(arguments, "unet", "vae", "text_encoder")
    checkpoint = arguments.work / CHECKPOINT
    if not checkpoint.exists():
        states = (model.parts[part].state_dict() for part in ("unet", "vae", "text_encoder"))
        unfinished = checkpoint.with_suffix(".part")
        save_file(ldm_checkpoint(*states), unfinished)
        unfinished.rename(checkpoint)
    with torch.inference_mode():
        numpy.save(image_file(arguments, "sdcli"), euler_image(model, arguments).numpy())


def euler_image(model: Any, arguments: argparse.Namespace) -> Any:
    """Pixels [H, W, 3], 0 to 1."""
    import torch

    from sdcli.diffusion.pipeline import Pipeline
    from sdcli.generation.resolve.resolve import resolve
    from sdcli.request.schema import GenerationRequest

    steps = schedule(arguments.repeats + 1)
    request = resolve(GenerationRequest(prompt=PROMPT, guidance_scale=GUIDANCE, steps=len(steps)), model.spec)
    condition = Pipeline.of(model).encode([request], guided=True, steps=len(steps)).at(1)
    states = condition.inputs["encoder_hidden_states"]
    cells = arguments.size // 8
    x = steps[0][1] * torch.randn((1, 4, cells, cells), generator=torch.Generator().manual_seed(SEED))
    for (t, sigma), (_, lower) in itertools.pairwise([*steps, (0, 0.0)]):
        scaled = x / (sigma**2 + 1) ** 0.5
        x = x + (lower - sigma) * guide(model.unet(torch.cat([scaled, scaled]), t, states).sample)
    decoded = model.vae.decode(x / model.vae.config.scaling_factor).sample[0]
    return (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)


def run_sd_cpp(arguments: argparse.Namespace) -> Figures:
    import numpy
    import stable_diffusion_cpp as package

    log: list[str] = []

    @package.sd_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: Any) -> None:
        log.append(text.decode(errors="replace"))

    package.sd_set_log_callback(keep, ctypes.c_void_p(0))
    started = time.perf_counter()
    model = package.StableDiffusion(
        model_path=str(arguments.work / CHECKPOINT),
        wtype=arguments.worker.partition("-")[2],
        n_threads=arguments.threads,
        rng_type="cpu",
        sampler_rng_type="cpu",
        vae_decode_only=True,
        diffusion_flash_attn=arguments.sd_cpp_flash,
        diffusion_conv_direct=arguments.sd_cpp_direct,
        vae_conv_direct=arguments.sd_cpp_direct,
        verbose=False,
    )
    loaded, steps = time.perf_counter(), schedule(arguments.repeats + 1)
    ends: list[float] = []

    def progress(_step: int, of: int, _seconds: float) -> None:
        if of == len(steps):
            ends.append(time.perf_counter())

    try:
        [image] = model.generate_image(
            prompt=PROMPT,
            width=arguments.size,
            height=arguments.size,
            seed=SEED,
            cfg_scale=GUIDANCE,
            sample_method="euler",
            sample_steps=len(steps),
            sigmas=",".join(str(sigma) for _, sigma in steps) + ",0",
            progress_callback=progress,
        )
    finally:
        (arguments.work / f"{arguments.worker}-{arguments.size}.log").write_text("".join(log))
    numpy.save(image_file(arguments, arguments.worker), numpy.asarray(image.convert("RGB")) / 255)
    return {
        STEP: [after - before for before, after in itertools.pairwise(ends[-len(steps) :])],
        DECODE: [decode_seconds("".join(log))],
        "load_s": loaded - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "version": f"{importlib.metadata.version('stable-diffusion-cpp-python')} of the Python package",
        "note_output": f"an image of {len(steps)} steps, as pixels of 0 to 1",
    }


def decode_seconds(log: str) -> float:
    """What the program's log says that decoding took. Raises SystemExit where it says nothing of it."""
    found = re.findall(r"latent \d+ decoded, taking ([\d.]+)s", log)
    if not found:
        raise SystemExit(f"stable-diffusion.cpp's log gives no time of a decode:\n{log[-2000:]}")
    return float(found[-1])
