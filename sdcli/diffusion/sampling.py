"""START HERE: a batch of requests in, denoising steps and images out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves; a refiner (SDXL) takes the end of the loop over.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.control_inputs import controls_for
from sdcli.diffusion.controlnet import ActiveControl
from sdcli.diffusion.denoiser import check_guidance, predict_for
from sdcli.diffusion.init_latents import check_start, start_enlarged, start_for
from sdcli.diffusion.loop import Step, denoise
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import Predict, scaled_input, taking_turns
from sdcli.diffusion.scheduler_factory import Advance, advance_with, make_scheduler
from sdcli.diffusion.start import Start, from_step, steps_before
from sdcli.errors import BadOutput, UsageError
from sdcli.models.loader import LoadedModel
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.autoencoder import generators_for
from sdcli.vae.latent_space import Report, quiet


def sample(pipeline: Pipeline, requests: Sequence[ResolvedRequest], *, report: Report = quiet) -> Iterator[Step]:
    """Denoise one batch. The requests are resolved and equal in all that `engine.plan` groups by.

    Yields every step; the last one's `latents` [B, C, h, w] are the finished images, ready for the space to decode.
    What is to be upscaled is denoised twice, and the steps of the second pass count from 0 again. The requests' LoRAs
    are merged into the painter's model already. `report` hears what had to be done where memory ran out.
    Raises UsageError for what the model cannot do, and BadOutput as soon as no image's latents are finite any more.
    """
    if requests[0].loras != tuple(applied.ref for applied in pipeline.model.loras):
        raise UsageError(f"{pipeline.model.spec.name} was loaded with other LoRAs than the request asks for")
    if tuple(one.adapting for one in requests[0].ip_adapters) != pipeline.model.ip_adapters:
        raise UsageError(f"{pipeline.model.spec.name} was loaded with other IP-Adapters than the request asks for")
    generators = generators_for([request.seed for request in requests])
    scheduler = scheduler_for(pipeline.model, requests[0])
    run: dict[str, Any] = {"generators": generators, "report": report}
    start = start_for(pipeline.model, pipeline.space, requests, scheduler=scheduler, **run)
    first, *second = requests[0].passes
    finished = yield from _denoised(pipeline, requests, start, scheduler, generators, steps=first)
    for steps in second:
        scheduler = scheduler_for(pipeline.model, requests[0])
        start = start_enlarged(finished, pipeline.space, requests[0], scheduler=scheduler, **run)
        size = dict(zip(("width", "height"), requests[0].final_size, strict=True))
        enlarged = [request.model_copy(update=size) for request in requests]
        yield from _denoised(pipeline, enlarged, start, scheduler, generators, steps=steps)


def check_image(pipeline: Pipeline, request: ResolvedRequest) -> None:
    """Raise now what `generate` would raise for this image alone, and for all that are generated with it.

    That are UsageError, NotFound, BadPicture and BadLatents, for the files that it names and for its guidance.
    """
    check_start(pipeline.space, request)
    controls_for(pipeline.model, [request])
    check_guidance(pipeline, request)


def _denoised(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    start: Start,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
) -> Generator[Step, None, Tensor]:
    """The loop from one start to its end; returns the last latents."""
    x, controls = start.x, controls_for(pipeline.model, requests)
    predict, advance, timesteps = _run_of(
        pipeline, requests, start, scheduler, generators, steps=steps, controls=controls
    )
    for step in denoise(predict, start.around_advance(advance), x, timesteps):
        x = step.latents
        if not x.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step
    return x


def _run_of(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    start: Start,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    controls: Sequence[ActiveControl],
) -> tuple[Predict, Advance, Tensor]:
    """What the loop runs, and over which timesteps; with a refiner, the last of them are the refiner's.

    Controls are made for the model, so the refiner does without them.
    Raises UsageError where one of the two would have no step to do.
    """
    shared, refiner = requests[0], pipeline.refiner
    if refiner is None:
        predict = scaled_input(predict_for(pipeline, requests, start, steps=steps, controls=controls), scheduler)
        return predict, advance_with(scheduler, generators, eta=shared.eta), start.timesteps
    assert shared.refiner_start is not None
    part, refining = shared.refiner_start, scheduler_for(refiner.model, shared)
    before = steps_before(scheduler, start.timesteps, part)
    rest = from_step(refining, steps_before(refining, refining.timesteps, part))
    if not before or not len(rest):
        idle = refiner.model.spec.name if before else pipeline.model.spec.name
        raise UsageError(f"refiner_start {part:g} of {shared.steps} steps leaves {idle} no step to generate")
    start = replace(start, timesteps=torch.cat([start.timesteps[:before], rest]))
    for control in shared.controls if shared.upscale is None else ():  # another pass may have the steps it asks for
        if not any(control.is_active(index, len(start.timesteps)) for index in range(before)):
            raise UsageError(f"controls: {control.model} has a say in the refiner's steps alone, where nothing asks it")
    turns = (
        _run_of(replace(one, refiner=None), requests, start, sampler, generators, steps=steps, controls=theirs)
        for one, sampler, theirs in ((pipeline, scheduler, controls), (refiner, refining, ()))
    )
    (first, first_advance, timesteps), (last, last_advance, _) = turns
    return taking_turns(first, last, after=before), taking_turns(first_advance, last_advance, after=before), timesteps


def scheduler_for(model: LoadedModel, request: ResolvedRequest) -> Any:
    """The request's scheduler with the model's noise schedule, its timesteps set. Raises UsageError for too many."""
    scheduler, steps = make_scheduler(request.scheduler, model.scheduler_config), request.steps
    levels = scheduler.config.num_train_timesteps
    if steps > levels:
        raise UsageError(f"{steps} steps are too many: {model.spec.name} was trained with {levels} levels of noise")
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler
