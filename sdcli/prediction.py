"""The network under the prompts of a batch, with all that guides it: one `Predict` for the loop."""

from __future__ import annotations

from collections.abc import Sequence

from sdcli.conditioning.condition import Conditions
from sdcli.denoise.control import ActiveControl, residuals_along
from sdcli.denoise.perturbed import perturbed
from sdcli.denoise.predict import (
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
from sdcli.denoise.start import Start
from sdcli.errors import UsageError
from sdcli.lean_imports import SD3Transformer2DModel
from sdcli.loading import LoadedModel
from sdcli.painter import Painter
from sdcli.request import GenerationRequest, known


def predict_for(
    painter: Painter,
    requests: Sequence[GenerationRequest],
    start: Start,
    *,
    steps: int,
    controls: Sequence[ActiveControl] = (),
) -> Predict:
    """The network under the requests' prompts: guided from outside, guided by an input of its own, or not at all."""
    shared, unet = requests[0], painter.model.unet
    scale_size = unet.config.get("time_cond_proj_dim")

    def network(conditions: Conditions) -> Predict:
        residuals = residuals_along(controls, start.timesteps, guess=bool(shared.guess_mode))

        def predict_at(step: int) -> Predict:
            condition = conditions.at(step)
            if scale_size is not None:
                condition = with_scale(condition, known(shared.guidance_scale), size=scale_size)
            if isinstance(unet, SD3Transformer2DModel):
                return transformer_predict(unet, condition)
            return unet_predict(unet, condition, residuals(condition))

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
