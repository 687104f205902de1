"""START HERE: a batch of requests in, denoising steps and pictures out.

prompt -> tokens -> CLIP hidden states (the condition) -> denoising loop over latents -> VAE -> pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli import latents as latent_space
from sdcli.conditioning.encode import TextEncoding
from sdcli.denoise.loop import Step, denoise
from sdcli.denoise.predict import guided, scaled_input, unet_predict
from sdcli.denoise.sampler import advance_with, make_scheduler
from sdcli.errors import BadOutput, UsageError
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known


@dataclass(frozen=True)
class Painter:
    """A loaded model with its text encoding, ready for any number of batches."""

    model: LoadedModel
    encode: TextEncoding

    @classmethod
    def of(cls, model: LoadedModel) -> Painter:
        return cls(model, TextEncoding(model))


def paint(painter: Painter, requests: Sequence[GenerationRequest]) -> Iterator[Step]:
    """Denoise one batch. The requests are resolved and differ in prompt, negative prompt and seed only.

    Yields every step; the last one's `latents` [B, C, H/8, W/8] are the finished pictures, ready for `decode`.
    Raises BadOutput as soon as no picture's latents are finite any more.
    """
    shared, model = requests[0], painter.model
    generators = latent_space.generators_for([known(request.seed) for request in requests])

    condition = painter.encode([request.painted_prompt for request in requests])
    takes_scale = model.unet.config.time_cond_proj_dim is not None
    if takes_scale:  # a distilled network with the guidance scale as an input
        if any(request.negative_prompt for request in requests):
            raise UsageError(f"{model.spec.name} was distilled without negative prompts; one would have no effect")
        predict = unet_predict(model.unet, condition, embedded_scale=shared.guidance_scale)
    elif shared.guided:
        unconditional = painter.encode([known(request.negative_prompt) for request in requests])
        predict = guided(unet_predict(model.unet, torch.cat([unconditional, condition])), known(shared.guidance_scale))
    else:
        predict = unet_predict(model.unet, condition)

    scheduler = make_scheduler(known(shared.scheduler), model.scheduler_config)
    scheduler.set_timesteps(shared.steps, device=model.device)
    noise = latent_space.initial_noise(generators, latent_shape(model, shared)).to(model.device)

    for step in denoise(
        scaled_input(predict, scheduler),
        advance_with(scheduler, generators, eta=known(shared.eta)),
        noise * scheduler.init_noise_sigma,
        scheduler.timesteps,
    ):
        if not step.latents.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step


def decode(painter: Painter, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Latents [C, h, w] of one picture -> pixels [3, 8h, 8w], float32 in 0..1 on the CPU."""
    return latent_space.decode(painter.model.vae, latents[None], tiled=tiled)[0]


def latent_shape(model: LoadedModel, request: GenerationRequest) -> tuple[int, int, int]:
    """(C, H/8, W/8) of one picture's latents."""
    return model.unet.config.in_channels, known(request.height) // 8, known(request.width) // 8
