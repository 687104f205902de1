"""One pass of a batch, and the network under its prompts with all guidance: one `Predict` for the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdcli.diffusion.attention.perturbed import perturbed
from sdcli.diffusion.controlnet import ActiveControl, Residuals, control_residuals, reuse_last_residuals
from sdcli.diffusion.guidance import (
    composed,
    conditional_half,
    guided,
    linear_scale,
    only_within,
    perturbation_guided,
    with_guidance_embedding,
)
from sdcli.diffusion.init_latents import InitLatents
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import Predict, network_predict, steps_by_timestep, stepwise
from sdcli.diffusion.reuse import FeatureReuse, check_reusable
from sdcli.encoders.condition import Conditioning, ConditioningSchedule
from sdcli.errors import UsageError
from sdcli.request.schema import ResolvedRequest


@dataclass(frozen=True)
class DenoisingPass:
    """One run of a batch through the loop: an upscaled image has two, any other one."""

    requests: Sequence[ResolvedRequest]
    """Resolved, and equal in all fields that `generation.plan` groups by; their size is that of this pass."""
    init: InitLatents
    scheduler: Any
    """A diffusers scheduler whose timesteps are set."""
    generators: Sequence[torch.Generator]
    """One CPU generator per image."""
    steps: int
    controls: Sequence[ActiveControl] = ()


def predict_for(pipeline: Pipeline, run: DenoisingPass) -> Predict:
    """The network under the prompts of a pass: with an unconditional half, with the scale as an input, or unguided."""
    shared, unet = run.requests[0], pipeline.model.unet
    scale_size = unet.config.get("time_cond_proj_dim")
    timesteps = run.init.timesteps
    by_step = steps_by_timestep(timesteps, run.steps)

    def residuals_of_run() -> Callable[[Conditioning], Residuals]:
        return control_residuals(run.controls, timesteps, guess_mode=bool(shared.guess_mode))

    def network(conditions: ConditioningSchedule, residuals: Callable[[Conditioning], Residuals]) -> Predict:
        every = shared.reuse or 1
        reuse = FeatureReuse(unet, every=every, steps=by_step) if every > 1 else None

        def predict_at(step: int) -> Predict:
            condition = conditions.at(step)
            if scale_size is not None:
                condition = with_guidance_embedding(condition, shared.guidance_scale, size=scale_size)

            def with_network(network: nn.Module) -> Predict:
                return network_predict(network, pipeline.model.family.call, condition, residuals(condition))

            return with_network(unet) if reuse is None else reuse.predict(with_network, condition)

        return run.init.wrap_predict(stepwise(predict_at, by_step) if conditions.changes else predict_at(1))

    def conditional(residuals: Callable[[Conditioning], Residuals]) -> Predict:
        return network(pipeline.encode(run.requests, guided=False, steps=run.steps), residuals)

    for request in run.requests:
        check_denoising(pipeline, request)
    residuals, perturbation = residuals_of_run(), None
    if shared.pag_scale:
        residuals, reused = reuse_last_residuals(residuals)
        worse = perturbed(conditional(lambda _: reused), unet, name=pipeline.model.spec.name)
        perturbation = worse, shared.pag_scale
    if scale_size is not None or not shared.guided:
        predict = conditional(residuals)
        return predict if perturbation is None else perturbation_guided(predict, *perturbation)
    conditions = pipeline.encode(run.requests, guided=True, steps=run.steps)
    both = network(conditions, residuals)
    if conditions.weights:
        both = composed(both, conditions.weights)
    first = shared.guidance_scale
    last = first if shared.guidance_end is None else shared.guidance_end
    scale = linear_scale(first, last, timesteps)
    predict = guided(both, scale, rescale=shared.guidance_rescale or 0, perturbed=perturbation)
    if shared.guidance_interval is None:
        return predict
    outside = conditional_half(both) if conditions.weights else conditional(residuals_of_run())
    part = shared.guidance_interval.indices(len(timesteps))
    return only_within(predict, outside, timesteps=timesteps[part.start : part.stop])


def check_denoising(pipeline: Pipeline, request: ResolvedRequest) -> None:
    """Raise UsageError for guidance that does not go with a resolved request's prompt, or with the network.

    A network that takes the guidance scale as an input has no unconditional half. Raises it, too, for a network whose
    features cannot be reused.
    """
    if request.reuse is not None:
        check_reusable(pipeline.model.unet, name=pipeline.model.spec.name)
    joined = request.prompts[request.passes[0]].weights
    if joined and request.pag_scale:
        raise UsageError("pag_scale does not go with AND: there is no one prompt to perturb")
    if pipeline.model.unet.config.get("time_cond_proj_dim") is None:
        return
    name = pipeline.model.spec.name
    if joined:
        raise UsageError(f"{name} was distilled without guidance, so AND would have no effect")
    without_effect = {
        "negative prompt": request.negative_prompt,
        "guidance end": request.guidance_end is not None,
        "guidance rescale": request.guidance_rescale,
        "guidance interval": request.guidance_interval,
        "pag scale": request.pag_scale,
    }
    for option in (option for option, value in without_effect.items() if value):
        raise UsageError(f"{name} was distilled without {option}; it would have no effect")
