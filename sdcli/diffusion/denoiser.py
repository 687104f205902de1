"""The network under the prompts of a batch, with all that guides it: one `Predict` for the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdcli.diffusion.attention.perturbed import perturbed
from sdcli.diffusion.controlnet import ActiveControl, Residuals, residuals_along, with_its_last_rows
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import (
    Predict,
    composed,
    conditional_half,
    evenly,
    guided,
    guided_away,
    only_within,
    steps_by_timestep,
    stepwise,
    transformer_predict,
    unet_predict,
    with_scale,
)
from sdcli.diffusion.start import Start
from sdcli.encoders.condition import Conditioning, ConditioningSchedule
from sdcli.errors import UsageError
from sdcli.io.lean_diffusers import SD3Transformer2DModel
from sdcli.request.schema import ResolvedRequest


def predict_for(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    start: Start,
    *,
    steps: int,
    controls: Sequence[ActiveControl] = (),
) -> Predict:
    """The network under the requests' prompts: guided from outside, guided by an input of its own, or not at all."""
    shared, unet = requests[0], pipeline.model.unet
    scale_size = unet.config.get("time_cond_proj_dim")

    def controlling() -> Callable[[Conditioning], Residuals]:
        return residuals_along(controls, start.timesteps, guess=bool(shared.guess_mode))

    def network(conditions: ConditioningSchedule, residuals: Callable[[Conditioning], Residuals]) -> Predict:
        def predict_at(step: int) -> Predict:
            condition = conditions.at(step)
            if scale_size is not None:
                condition = with_scale(condition, shared.guidance_scale, size=scale_size)
            if isinstance(unet, SD3Transformer2DModel):
                return transformer_predict(unet, condition)
            return unet_predict(unet, condition, residuals(condition))

        by_step = steps_by_timestep(start.timesteps, steps)
        return start.around_network(stepwise(predict_at, by_step) if conditions.changes else predict_at(1))

    def plain(residuals: Callable[[Conditioning], Residuals]) -> Predict:
        return network(pipeline.encode(requests, guided=False, steps=steps), residuals)

    for request in requests:
        check_guidance(pipeline, request)
    residuals, away = controlling(), None
    if shared.pag_scale:
        residuals, again = with_its_last_rows(residuals)
        away = perturbed(plain(lambda _: again), unet, name=pipeline.model.spec.name), shared.pag_scale
    if scale_size is not None or not shared.guided:
        return plain(residuals) if away is None else guided_away(plain(residuals), *away)
    conditions = pipeline.encode(requests, guided=True, steps=steps)
    both = network(conditions, residuals)
    if conditions.weights:
        both = composed(both, conditions.weights)
    first = shared.guidance_scale
    last = first if shared.guidance_end is None else shared.guidance_end
    predict = guided(both, evenly(first, last, start.timesteps), rescale=shared.guidance_rescale or 0, away=away)
    if shared.guidance_interval is None:
        return predict
    outside = conditional_half(both) if conditions.weights else plain(controlling())
    part = shared.guidance_interval.indices(len(start.timesteps))
    return only_within(predict, outside, timesteps=start.timesteps[part.start : part.stop])


def check_guidance(pipeline: Pipeline, request: ResolvedRequest) -> None:
    """Raise UsageError for guidance that does not go with a resolved request's prompt, or with the network.

    One that takes the scale as an input has no unconditional half.
    """
    joined = pipeline.encode([request], guided=request.guided, steps=request.passes[0]).weights
    if joined and request.pag_scale:
        raise UsageError("pag_scale does not go with AND: there is no one prompt to perturb")
    if pipeline.model.unet.config.get("time_cond_proj_dim") is None:
        return
    name = pipeline.model.spec.name
    if joined:
        raise UsageError(f"{name} was distilled without guidance, so AND would have no effect")
    asked = {
        "negative prompt": request.negative_prompt,
        "guidance end": request.guidance_end is not None,
        "guidance rescale": request.guidance_rescale,
        "guidance interval": request.guidance_interval,
        "pag scale": request.pag_scale,
    }
    for what in (what for what, value in asked.items() if value):
        raise UsageError(f"{name} was distilled without {what}; it would have no effect")
