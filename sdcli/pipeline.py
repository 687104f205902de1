"""START HERE: a batch of requests in, denoising steps and pictures out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves; a refiner (SDXL) takes the end of the loop over.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdcli.conditioning.condition import Conditions
from sdcli.conditioning.encode import Encode, encoding_of
from sdcli.denoise.loop import Step, denoise
from sdcli.denoise.perturbed import perturbed
from sdcli.denoise.predict import (
    Predict,
    composed,
    conditional_half,
    evenly,
    guided,
    guided_away,
    only_within,
    scaled_input,
    steps_by_timestep,
    stepwise,
    taking_turns,
    unet_predict,
    with_scale,
)
from sdcli.denoise.sampler import Advance, advance_with, make_scheduler
from sdcli.denoise.start import Start, from_step, steps_before
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
    refiner: Painter | None = None
    """Ends what this one begins; without a VAE of its own."""

    @classmethod
    def of(cls, model: LoadedModel, *, refiner: LoadedModel | None = None) -> Painter:
        """Raises UsageError for a refiner that does not go with the model, and for one that is to begin."""
        if model.is_sdxl and "text_encoder" not in model.parts:
            raise UsageError(f"{model.spec.name} is a refiner, which ends what another model began: --refiner")
        if refiner is not None and not (model.is_sdxl and refiner.is_sdxl):
            other = refiner if model.is_sdxl else model
            raise UsageError(f"a refiner and its model are both of the sdxl family, and {other.spec.name} is not")
        space = space_of(model)
        ending = cls(refiner, encoding_of(refiner), space) if refiner is not None else None
        return cls(model, encoding_of(model), space, ending)

    def with_model(self, model: LoadedModel) -> Painter:
        """The same with the model's own weights changed, as by LoRAs; the refiner stays as it is."""
        return replace(Painter.of(model), refiner=self.refiner)

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part, the refiner's too."""
        ends = self.refiner.weights() if self.refiner is not None else {}
        return {**self.model.weights(), **{f"refiner_{part}": identity for part, identity in ends.items()}}


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
        size = dict(zip(("width", "height"), requests[0].final_size, strict=True))
        enlarged = [request.model_copy(update=size) for request in requests]
        yield from _denoised(painter, enlarged, start, scheduler, generators, steps=steps)


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
    predict, advance, timesteps = _run_of(painter, requests, start, scheduler, generators, steps=steps)
    for step in denoise(predict, start.around_advance(advance), x, timesteps):
        x = step.latents
        if not x.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step
    return x


def _run_of(
    painter: Painter,
    requests: Sequence[GenerationRequest],
    start: Start,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
) -> tuple[Predict, Advance, Tensor]:
    """What the loop runs, and over which timesteps; with a refiner, the last of them are the refiner's.

    Raises UsageError where one of the two would have no step to do.
    """
    shared, refiner = requests[0], painter.refiner
    if refiner is None:
        predict = scaled_input(predict_for(painter, requests, start, steps=steps), scheduler)
        return predict, advance_with(scheduler, generators, eta=known(shared.eta)), start.timesteps
    part, refining = known(shared.refiner_start), scheduler_for(refiner.model, shared)
    before = steps_before(scheduler, start.timesteps, part)
    rest = from_step(refining, steps_before(refining, refining.timesteps, part))
    if not before or not len(rest):
        idle = refiner.model.spec.name if before else painter.model.spec.name
        raise UsageError(f"refiner_start {part:g} of {shared.steps} steps leaves {idle} no step to paint")
    start = replace(start, timesteps=torch.cat([start.timesteps[:before], rest]))
    turns = (
        _run_of(replace(one, refiner=None), requests, start, sampler, generators, steps=steps)
        for one, sampler in ((painter, scheduler), (refiner, refining))
    )
    (first, first_advance, timesteps), (last, last_advance, _) = turns
    return taking_turns(first, last, after=before), taking_turns(first_advance, last_advance, after=before), timesteps


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

    def plain() -> Predict:
        return network(painter.encode(requests, guided=False, steps=steps))

    if scale_size is not None:
        _refuse_guidance(painter.model, requests, painter.encode(requests, guided=False, steps=steps))
    away = (perturbed(plain(), unet, name=painter.model.spec.name), shared.pag_scale) if shared.pag_scale else None
    if scale_size is not None or not shared.guided:
        return plain() if away is None else guided_away(plain(), *away)
    conditions = painter.encode(requests, guided=True, steps=steps)
    both = network(conditions)
    if conditions.weights:
        if away is not None:
            raise UsageError("pag_scale does not go with AND: there is no one prompt to perturb")
        both = composed(both, conditions.weights)
    first = known(shared.guidance_scale)
    last = first if shared.guidance_end is None else shared.guidance_end
    predict = guided(both, evenly(first, last, start.timesteps), rescale=shared.guidance_rescale or 0, away=away)
    if shared.guidance_interval is None:
        return predict
    outside = conditional_half(both) if conditions.weights else plain()
    part = shared.guidance_interval
    return only_within(predict, outside, timesteps=start.timesteps, start=part.start, stop=part.stop)


def _refuse_guidance(model: LoadedModel, requests: Sequence[GenerationRequest], conditions: Conditions) -> None:
    """A network that takes the scale as an input has no unconditional half."""
    if conditions.weights:
        raise UsageError(f"{model.spec.name} was distilled without guidance, so AND would have no effect")
    without = ("negative_prompt", "guidance_end", "guidance_rescale", "guidance_interval", "pag_scale")
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
