"""A request and a model -> the request as it will be generated: open fields chosen, impossible requests refused."""

from __future__ import annotations

import math
import secrets
from typing import Any

from pydantic import ValidationError

from sdcli.errors import UsageError
from sdcli.generation.resolve.inputs import (
    Measure,
    controls_filled,
    image_prompts_filled,
    pinned_embeddings,
    start_filled,
)
from sdcli.images.formats import MAX_PIXELS
from sdcli.models.registry import ModelSpec, size_problem
from sdcli.request.prompt_syntax import used
from sdcli.request.schedulers import SCHEDULERS, TRAINED, schedulers_for
from sdcli.request.schema import GenerationRequest, ResolvedRequest, check_needs, first_problem, watermark_room

DEFAULT_REFINER_START = 0.8


def resolve(request: GenerationRequest, spec: ModelSpec, *, measure: Measure | None = None) -> ResolvedRequest:
    """The request as it will be generated: every None filled from the model's defaults, the seed drawn.

    A start image gives its own size, where one can `measure` it. None stays where a field does not apply.
    Raises UsageError where a typed field would have no effect with the rest, or the model cannot do it.
    """
    check_needs(request)
    defaults = spec.defaults
    chosen: dict[str, Any] = {
        "model": spec.name,
        "negative_prompt": "",
        "prompt_template": defaults.prompt_template,
        "prompt_syntax": "a1111" if spec.family.reads_text else "plain",
        "width": defaults.width,
        "height": defaults.height,
        "steps": defaults.steps,
        "guidance_scale": defaults.guidance_scale,
        "scheduler": defaults.scheduler,
        "eta": 0.0,
    }
    if request.refiner is not None:
        chosen["refiner_start"] = DEFAULT_REFINER_START
    typed = {name: value for name, value in request if value is not None}
    if "seed" not in typed:
        chosen["seed"] = secrets.randbelow(2**32)
    if request.variation_strength is not None and request.variation_seed is None:
        chosen["variation_seed"] = secrets.randbelow(2**32)
    from_start = start_filled(request, step=spec.kind.size_step, cell=spec.kind.cell, measure=measure)
    spec.family.check(typed, model=spec.name)
    pinned = {**controls_filled(request), **image_prompts_filled(request)}
    try:
        resolved = ResolvedRequest.model_validate({**chosen, **typed, **from_start, **pinned, "model": spec.name})
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None
    for side, pixels in zip(("width", "height"), resolved.final_size, strict=True):
        problem = size_problem(getattr(resolved, side), spec.kind) or size_problem(pixels, spec.kind)
        if problem is not None:
            raise UsageError(f"{side}: {problem}")
    if math.prod(resolved.final_size) > MAX_PIXELS:
        width, height = resolved.final_size
        raise UsageError(f"an image of {width}x{height} would have more than {MAX_PIXELS:,} pixels")
    _check_process(resolved, spec)
    _check_condition(resolved, spec)
    _check_refiner(resolved)
    if resolved.embeddings:
        resolved = resolved.model_copy(update={"embeddings": pinned_embeddings(resolved.embeddings)})
    if resolved.prompt_syntax == "a1111":
        _check_syntax(resolved)
    shares = (resolved.strength, resolved.upscale and resolved.upscale.strength)
    for name, share, steps in zip(("strength", "upscale"), shares, resolved.passes, strict=False):
        if steps < 1:
            raise UsageError(f"{name}: {share:g} of {resolved.steps} steps leaves no step to generate")
    _check_intervals(resolved)
    if spec.kind.inpaints and not resolved.masked:
        raise UsageError(f"{spec.name} is an inpainting model; it needs --init-image, and --mask or --extend")
    if resolved.watermark is not None:
        width, height = resolved.final_size
        room = watermark_room(width, height)
        if len(resolved.watermark.encode()) > room:
            raise UsageError(f"watermark: an image of {width}x{height} pixels has room for {room} bytes")
    for name in ("guidance_end", "guidance_rescale", "guidance_interval"):
        if getattr(resolved, name) is not None and not resolved.guided:
            raise UsageError(f"{name} has no effect at guidance scale {resolved.guidance_scale:g}; use one above 1")
    if resolved.eta and not SCHEDULERS[resolved.scheduler].uses_eta:
        raise UsageError(f"eta has no effect with the {resolved.scheduler} scheduler; only ddim uses it")
    return resolved


def _check_process(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a scheduler of another process than the model's."""
    process, scheduler = spec.family.process, request.scheduler
    if SCHEDULERS[scheduler].process != process:
        raise UsageError(
            f"the {scheduler} scheduler does not go with {spec.name}, which was trained {TRAINED[process]}; "
            f"those that do: {', '.join(schedulers_for(process))}"
        )


def _check_condition(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a prompt, a negative prompt or a guidance scale that the model has no use for."""
    kind, scale = spec.kind, request.guidance_scale
    if not spec.family.takes_prompt and (request.full_prompt or request.negative_prompt):
        asked = request.full_prompt or request.negative_prompt
        raise UsageError(f"{spec.name} generates without a prompt; {asked!r} would have no effect")
    if request.prompt_syntax == "plain" and request.embeddings:
        raise UsageError("embeddings have no effect with prompt_syntax plain, where every word is text")
    if kind.unguided and (scale != 1 or request.guided or request.negative_prompt):
        raise UsageError(
            f"{spec.name} {kind.unguided}, so it cannot be guided: no negative prompt, and a guidance scale of 1"
        )
    if request.negative_prompt and not request.guided:
        raise UsageError(f"a negative prompt has no effect at guidance scale {scale:g}; use one above 1")
    if kind.classes:
        kind.label(request.full_prompt)
        if request.negative_prompt:
            kind.label(request.negative_prompt)


def _check_refiner(request: ResolvedRequest) -> None:
    """Raise UsageError for what does not go with a refiner."""
    if request.refiner is None:
        return
    if not SCHEDULERS[request.scheduler].begins_anywhere:
        raise UsageError(
            f"the {request.scheduler} scheduler cannot begin in the middle, as a refiner does; use another"
        )
    if request.masked:
        raise UsageError("a refiner generates the whole image, so it goes without --mask and --extend")


def _check_syntax(request: ResolvedRequest) -> None:
    """Raise UsageError for what a prompt asks for in vain: AND without guidance, an embedding that it does not name."""
    prompts = request.prompts[request.passes[0]]
    if prompts.weights and not request.guided:
        raise UsageError(f"AND needs guidance to have an effect; {request.guidance_scale:g} is off, use one above 1")
    words = [embedding.word for embedding in request.embeddings]
    unused = sorted(set(words) - used((*prompts.positive, *([prompts.negative] if request.guided else [])), words))
    if unused:
        raise UsageError(f"embeddings: no prompt has the word {unused[0]!r}, so its vectors would have no effect")


def _check_intervals(request: ResolvedRequest) -> None:
    """Raise UsageError for a control, or a guidance interval, of a resolved request that has a say in no step."""
    counts = [SCHEDULERS[request.scheduler].calls(steps) for steps in request.passes]
    for one in request.controls:
        if not any(one.is_active(index, count) for count in counts for index in range(count)):
            raise UsageError(f"controls: {one.start:g}-{one.end:g} of {request.steps} steps leaves {one.model} no step")
    part = request.guidance_interval
    if part is not None and not any(part.indices(count) for count in counts):
        raise UsageError(f"guidance_interval: {part} of {request.steps} steps leaves guidance no step")
