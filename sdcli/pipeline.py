"""START HERE: a batch of requests in, denoising steps and pictures out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdcli.conditioning.condition import Conditions
from sdcli.conditioning.encode import Encode, encoding_of
from sdcli.denoise.loop import Step, denoise
from sdcli.denoise.predict import (
    Predict,
    composed,
    guided,
    scaled_input,
    steps_by_timestep,
    stepwise,
    unet_predict,
    with_scale,
)
from sdcli.denoise.sampler import advance_with, make_scheduler
from sdcli.errors import BadOutput, UsageError
from sdcli.latents import generators_for, initial_noise
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known
from sdcli.spaces import Space, space_of


@dataclass(frozen=True)
class Painter:
    """A loaded model with its encoding of prompts and its space, ready for any number of batches."""

    model: LoadedModel
    encode: Encode
    space: Space

    @classmethod
    def of(cls, model: LoadedModel) -> Painter:
        return cls(model, encoding_of(model), space_of(model))


def paint(painter: Painter, requests: Sequence[GenerationRequest]) -> Iterator[Step]:
    """Denoise one batch. The requests are resolved and differ in prompt, negative prompt and seed only.

    Yields every step; the last one's `latents` [B, C, h, w] are the finished pictures, ready for `decode`.
    Raises UsageError for what the model cannot do, and BadOutput as soon as no picture's latents are finite any more.
    """
    shared, model = requests[0], painter.model
    generators = generators_for([known(request.seed) for request in requests])
    shape = painter.space.shape(model.unet.config.in_channels, width=known(shared.width), height=known(shared.height))
    scheduler = scheduler_for(model, shared)
    noise = initial_noise(generators, shape).to(model.device)

    for step in denoise(
        scaled_input(predict_for(painter, requests, scheduler), scheduler),
        advance_with(scheduler, generators, eta=known(shared.eta)),
        noise * scheduler.init_noise_sigma,
        scheduler.timesteps,
    ):
        if not step.latents.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step


def decode(painter: Painter, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Latents [C, h, w] of one picture -> pixels [3, H, W], float32 in 0..1 on the CPU."""
    return painter.space.decode(latents[None], tiled=tiled)[0]


def predict_for(painter: Painter, requests: Sequence[GenerationRequest], scheduler: Any) -> Predict:
    """The network under the requests' prompts: guided from outside, guided by an input of its own, or not at all."""
    shared, unet = requests[0], painter.model.unet
    conditions, size = conditions_for(painter, requests), guidance_input(painter)

    def predict_at(step: int) -> Predict:
        condition = conditions.at(step)
        if size is not None:
            condition = with_scale(condition, known(shared.guidance_scale), size=size)
        return unet_predict(unet, condition)

    predict = predict_at(1)
    if conditions.changes:
        predict = stepwise(predict_at, steps_by_timestep(scheduler.timesteps, known(shared.steps)))
    if conditions.weights:
        predict = composed(predict, conditions.weights)
    return guided(predict, known(shared.guidance_scale)) if shared.guided and size is None else predict


def conditions_for(painter: Painter, requests: Sequence[GenerationRequest]) -> Conditions:
    """What the requests tell the network, remembered by the encoder. Raises UsageError for what would have no effect.

    They are alike: `painter.encode.shape` is the same for all.
    """
    distilled = guidance_input(painter) is not None
    conditions = painter.encode(requests, guided=requests[0].guided and not distilled)
    if distilled and (conditions.weights or any(request.negative_prompt for request in requests)):
        what = "AND" if conditions.weights else "negative prompts"
        raise UsageError(f"{painter.model.spec.name} was distilled without {what}; that would have no effect")
    return conditions


def guidance_input(painter: Painter) -> int | None:
    """The size of the guidance scale as an input of the network, where it was distilled to take one (LCM)."""
    return painter.model.unet.config.get("time_cond_proj_dim")


def scheduler_for(model: LoadedModel, request: GenerationRequest) -> Any:
    """The request's scheduler with the model's noise schedule, its timesteps set. Raises UsageError for too many."""
    scheduler, steps = make_scheduler(known(request.scheduler), model.scheduler_config), known(request.steps)
    levels = scheduler.config.num_train_timesteps
    if steps > levels:
        raise UsageError(f"{steps} steps are too many: {model.spec.name} was trained with {levels} levels of noise")
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler
