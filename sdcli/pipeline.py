"""START HERE: a batch of requests in, denoising steps and pictures out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli.conditioning.condition import Conditions
from sdcli.conditioning.encode import Encode, encoding_of
from sdcli.denoise.loop import Step, denoise
from sdcli.denoise.predict import (
    Predict,
    composed,
    conditional_half,
    evenly,
    guided,
    only_within,
    scaled_input,
    steps_by_timestep,
    stepwise,
    unet_predict,
    with_scale,
)
from sdcli.denoise.sampler import advance_with, make_scheduler
from sdcli.denoise.start import Start
from sdcli.errors import BadOutput, UsageError
from sdcli.latents import generators_for
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known
from sdcli.spaces import Space, space_of
from sdcli.starting import start_enlarged, start_for


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
    """Denoise one batch. The requests are resolved and equal in all that `engine.plan` groups by.

    Yields every step; the last one's `latents` [B, C, h, w] are the finished pictures, ready for `decode`. What is to
    be upscaled is denoised twice, and the steps of the second pass count from 0 again. The requests' LoRAs are merged
    into the painter's model already.
    Raises UsageError for what the model cannot do, and BadOutput as soon as no picture's latents are finite any more.
    """
    if requests[0].loras != tuple(applied.ref for applied in painter.model.loras):
        raise UsageError(f"{painter.model.spec.name} was loaded with other LoRAs than the request asks for")
    generators = generators_for([known(request.seed) for request in requests])
    scheduler = scheduler_for(painter.model, requests[0])
    start = start_for(painter.model, painter.space, requests, scheduler=scheduler, generators=generators)
    first, *second = requests[0].passes
    finished = yield from _denoised(painter, requests, start, scheduler, generators, steps=first)
    for steps in second:
        scheduler = scheduler_for(painter.model, requests[0])
        start = start_enlarged(finished, painter.space, requests[0], scheduler=scheduler, generators=generators)
        yield from _denoised(painter, requests, start, scheduler, generators, steps=steps)


def _denoised(
    painter: Painter,
    requests: Sequence[GenerationRequest],
    start: Start,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
) -> Generator[Step, None, Tensor]:
    """The loop from one start to its end; returns the last latents."""
    x = start.x
    for step in denoise(
        scaled_input(predict_for(painter, requests, start, steps=steps), scheduler),
        start.around_advance(advance_with(scheduler, generators, eta=known(requests[0].eta))),
        x,
        start.timesteps,
    ):
        x = step.latents
        if not x.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step
    return x


def decode(painter: Painter, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Latents [C, h, w] of one picture -> pixels [3, H, W], float32 in 0..1 on the CPU."""
    return painter.space.decode(latents[None], tiled=tiled)[0]


def predict_for(painter: Painter, requests: Sequence[GenerationRequest], start: Start, *, steps: int) -> Predict:
    """The network under the requests' prompts: guided from outside, guided by an input of its own, or not at all."""
    shared, unet = requests[0], painter.model.unet
    scale_size = unet.config.get("time_cond_proj_dim")

    def network(conditions: Conditions) -> Predict:
        def predict_at(step: int) -> Predict:
            condition = conditions.at(step)
            if scale_size is not None:
                condition = with_scale(condition, known(shared.guidance_scale), size=scale_size)
            return unet_predict(unet, condition)

        predict = predict_at(1)
        if conditions.changes:
            predict = stepwise(predict_at, steps_by_timestep(start.timesteps, steps))
        return start.around_network(predict)

    if scale_size is not None or not shared.guided:
        conditions = painter.encode(requests, guided=False, steps=steps)
        if scale_size is not None:
            _refuse_guidance(painter.model, requests, conditions)
        return network(conditions)
    conditions = painter.encode(requests, guided=True, steps=steps)
    both = network(conditions)
    if conditions.weights:
        both = composed(both, conditions.weights)
    first = known(shared.guidance_scale)
    last = first if shared.guidance_end is None else shared.guidance_end
    predict = guided(both, evenly(first, last, start.timesteps), rescale=shared.guidance_rescale or 0)
    if shared.guidance_interval is None:
        return predict
    if conditions.weights:
        plain = conditional_half(both)
    else:
        plain = network(painter.encode(requests, guided=False, steps=steps))
    part = shared.guidance_interval
    return only_within(predict, plain, timesteps=start.timesteps, start=part.start, stop=part.stop)


def _refuse_guidance(model: LoadedModel, requests: Sequence[GenerationRequest], conditions: Conditions) -> None:
    """A network that takes the scale as an input has no unconditional half."""
    if conditions.weights:
        raise UsageError(f"{model.spec.name} was distilled without guidance, so AND would have no effect")
    without = ("negative_prompt", "guidance_end", "guidance_rescale", "guidance_interval")
    for name in without:
        if any(getattr(request, name) for request in requests):
            what = name.replace("_", " ")
            raise UsageError(f"{model.spec.name} was distilled without {what}; it would have no effect")


def scheduler_for(model: LoadedModel, request: GenerationRequest) -> Any:
    """The request's scheduler with the model's noise schedule, its timesteps set. Raises UsageError for too many."""
    scheduler, steps = make_scheduler(known(request.scheduler), model.scheduler_config), known(request.steps)
    levels = scheduler.config.num_train_timesteps
    if steps > levels:
        raise UsageError(f"{steps} steps are too many: {model.spec.name} was trained with {levels} levels of noise")
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler
