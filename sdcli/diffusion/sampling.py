"""START HERE: a batch of resolved requests in, denoising steps out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves; a refiner (SDXL) does the last steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.controlnet import active_controls
from sdcli.diffusion.denoiser import DenoisingPass, check_denoising, predict_for
from sdcli.diffusion.init_latents import check_init_image, enlarged_latents, init_latents
from sdcli.diffusion.loop import Step, denoise
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import Predict, scale_input, switch_after
from sdcli.diffusion.scheduler_factory import Advance, advance_with, make_scheduler
from sdcli.diffusion.timesteps import steps_before, timesteps_from
from sdcli.errors import BadOutput, UsageError
from sdcli.models.loaded_model import LoadedModel
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.autoencoder import generators_for
from sdcli.vae.latent_space import Report, quiet


def sample(pipeline: Pipeline, requests: Sequence[ResolvedRequest], *, report: Report = quiet) -> Iterator[Step]:
    """Denoise one batch. The requests are resolved and equal in all fields that `generation.plan` groups by.

    Yields every step; the last one's `latents` [B, C, h, w] are the finished images, ready to be decoded. An upscaled
    image is denoised twice, and the steps of the second pass count from 0 again. The requests' LoRAs and IP-Adapters
    are in the pipeline's model already. `report` gets a sentence for each memory fallback.
    Raises UsageError for what the model cannot do, and BadOutput as soon as no image's latents are finite any more.
    """
    shared = requests[0]
    if shared.loras != tuple(applied.ref for applied in pipeline.model.loras):
        raise UsageError(f"{pipeline.model.spec.name} was loaded with other LoRAs than the request names")
    if tuple(one.adapting for one in shared.ip_adapters) != pipeline.model.ip_adapters:
        raise UsageError(f"{pipeline.model.spec.name} was loaded with other IP-Adapters than the request names")
    generators = generators_for([request.seed for request in requests])
    scheduler = scheduler_for(pipeline.model, shared)
    init = init_latents(pipeline, requests, scheduler=scheduler, generators=generators, report=report)
    first, *second = shared.passes
    finished = yield from _denoised(pipeline, DenoisingPass(requests, init, scheduler, generators, first))
    for steps in second:
        scheduler = scheduler_for(pipeline.model, shared)
        init = enlarged_latents(finished, pipeline, shared, scheduler=scheduler, generators=generators, report=report)
        size = dict(zip(("width", "height"), shared.final_size, strict=True))
        enlarged = [request.model_copy(update=size) for request in requests]
        yield from _denoised(pipeline, DenoisingPass(enlarged, init, scheduler, generators, steps))


def check_request(pipeline: Pipeline, request: ResolvedRequest) -> None:
    """Raise what `sample` would raise for this image alone, for its files, its guidance and its reuse of features.

    Raises UsageError, NotFound, BadImage and BadLatents.
    """
    check_init_image(pipeline, request)
    active_controls(pipeline, [request])
    check_denoising(pipeline, request)


def _denoised(pipeline: Pipeline, run: DenoisingPass) -> Generator[Step, None, Tensor]:
    """The loop of one pass; returns the last latents."""
    run = replace(run, controls=active_controls(pipeline, run.requests))
    x = run.init.x
    predict, advance, timesteps = _loop_inputs(pipeline, run)
    for step in denoise(predict, run.init.wrap_advance(advance), x, timesteps):
        x = step.latents
        if not x.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step
    return x


def _loop_inputs(pipeline: Pipeline, run: DenoisingPass) -> tuple[Predict, Advance, Tensor]:
    """What the loop runs, and over which timesteps; the last of them may be a refiner's.

    ControlNets are made for the model, so the refiner works without them.
    Raises UsageError where one of the two would have no step to do.
    """
    shared, refiner = run.requests[0], pipeline.refiner
    if refiner is None:
        predict = scale_input(predict_for(pipeline, run), run.scheduler)
        return predict, advance_with(run.scheduler, run.generators, eta=shared.eta), run.init.timesteps
    assert shared.refiner_start is not None
    part, refining = shared.refiner_start, scheduler_for(refiner.model, shared)
    before = steps_before(run.scheduler, run.init.timesteps, part)
    rest = timesteps_from(refining, steps_before(refining, refining.timesteps, part))
    if not before or not len(rest):
        idle = refiner.model.spec.name if before else pipeline.model.spec.name
        raise UsageError(f"refiner_start {part:g} of {shared.steps} steps leaves {idle} no step to do")
    run = replace(run, init=replace(run.init, timesteps=torch.cat([run.init.timesteps[:before], rest])))
    count = len(run.init.timesteps)
    for control in shared.controls if shared.upscale is None else ():  # another pass may have the steps it is for
        if not any(control.is_active(index, count) for index in range(before)):
            raise UsageError(
                f"controls: {control.model} is active in the refiner's steps alone, which have no controls"
            )
    first, first_advance, timesteps = _loop_inputs(replace(pipeline, refiner=None), run)
    last, last_advance, _ = _loop_inputs(refiner, replace(run, scheduler=refining, controls=()))
    return switch_after(first, last, after=before), switch_after(first_advance, last_advance, after=before), timesteps


def scheduler_for(model: LoadedModel, request: ResolvedRequest) -> Any:
    """The request's scheduler with the model's noise schedule, its timesteps set. Raises UsageError for too many."""
    scheduler, steps = make_scheduler(request.scheduler, model.scheduler_config), request.steps
    levels = scheduler.config.num_train_timesteps
    if steps > levels:
        raise UsageError(f"{steps} steps are too many: {model.spec.name} was trained with {levels} noise levels")
    cell = model.spec.kind.cell
    further = model.family.timesteps(model.scheduler_config, request.height // cell, request.width // cell)
    scheduler.set_timesteps(steps, device=model.device, **further)
    by_index = not hasattr(scheduler, "sigmas")  # looks timesteps up in the schedule; `steps_offset` can be beyond it
    if by_index and int(scheduler.timesteps.max()) >= levels:
        raise UsageError(f"{steps} steps are too many for {request.scheduler} with {model.spec.name}; use fewer")
    return scheduler
