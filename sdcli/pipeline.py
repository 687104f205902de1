"""START HERE: a batch of requests in, denoising steps and pictures out.

prompt -> condition (CLIP hidden states; or the label of a class, or nothing) -> denoising loop over latents -> VAE ->
pixels. A model without a VAE denoises the pixels themselves; a refiner (SDXL) takes the end of the loop over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli.conditioning.condition import Condition
from sdcli.conditioning.encode import Encode, encoding_of
from sdcli.denoise.loop import Stage, Step, denoise_in_stages
from sdcli.denoise.predict import Predict, guided, scaled_input, unet_predict, with_scale
from sdcli.denoise.sampler import advance_with, make_scheduler, steps_before
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

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part, the refiner's too."""
        ends = self.refiner.weights() if self.refiner is not None else {}
        return {**self.model.weights(), **{f"refiner_{part}": identity for part, identity in ends.items()}}


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

    stages = stages_for(painter, requests, scheduler, generators)
    for step in denoise_in_stages(stages, noise * scheduler.init_noise_sigma):
        if not step.latents.isfinite().flatten(1).all(dim=1).any():
            raise BadOutput(f"the latents are no longer finite (NaN) after step {step.index + 1} of {step.count}")
        yield step


def decode(painter: Painter, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Latents [C, h, w] of one picture -> pixels [3, H, W], float32 in 0..1 on the CPU."""
    return painter.space.decode(latents[None], tiled=tiled)[0]


def stages_for(
    painter: Painter, requests: Sequence[GenerationRequest], scheduler: Any, generators: Sequence[torch.Generator]
) -> list[Stage]:
    """All steps for the model's UNet; or with a refiner the first ones for the model's, the rest for the refiner's.

    Raises UsageError where one of the two would have no step to do.
    """
    shared = requests[0]

    def stage(painter: Painter, scheduler: Any, *, first: int = 0, end: int | None = None) -> Stage:
        return Stage(
            scaled_input(predict_for(painter, requests), scheduler),
            advance_with(scheduler, generators, eta=known(shared.eta), first=first),
            scheduler.timesteps[first:end],
        )

    if painter.refiner is None:
        return [stage(painter, scheduler)]
    start, refining = known(shared.refiner_start), scheduler_for(painter.refiner.model, shared)
    stages = [
        stage(painter, scheduler, end=steps_before(scheduler, start)),
        stage(painter.refiner, refining, first=steps_before(refining, start)),
    ]
    if not all(len(stage.timesteps) for stage in stages):
        idle = "the refiner" if len(stages[0].timesteps) else painter.model.spec.name
        raise UsageError(f"refiner_start {start:g} leaves {idle} none of the {shared.steps} steps")
    return stages


def predict_for(painter: Painter, requests: Sequence[GenerationRequest]) -> Predict:
    """The network under the requests' prompts: guided from outside, guided by an input of its own, or not at all."""
    shared, unet = requests[0], painter.model.unet
    condition = painter.encode(requests)
    scale_size = unet.config.get("time_cond_proj_dim")
    if scale_size is not None:
        if any(request.negative_prompt for request in requests):
            name = painter.model.spec.name
            raise UsageError(f"{name} was distilled without negative prompts; one would have no effect")
        return unet_predict(unet, with_scale(condition, known(shared.guidance_scale), size=scale_size))
    if not shared.guided:
        return unet_predict(unet, condition)
    unconditional = painter.encode.unconditional(requests)
    return guided(unet_predict(unet, Condition.rows([unconditional, condition])), known(shared.guidance_scale))


def scheduler_for(model: LoadedModel, request: GenerationRequest) -> Any:
    """The request's scheduler with the model's noise schedule, its timesteps set. Raises UsageError for too many."""
    scheduler, steps = make_scheduler(known(request.scheduler), model.scheduler_config), known(request.steps)
    levels = scheduler.config.num_train_timesteps
    if steps > levels:
        raise UsageError(f"{steps} steps are too many: {model.spec.name} was trained with {levels} levels of noise")
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler
