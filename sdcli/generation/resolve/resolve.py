"""A request and a model -> the request as it will be generated: open fields chosen, impossible requests refused."""

from __future__ import annotations

import secrets
from typing import Any

from pydantic import ValidationError

from sdcli.errors import UsageError
from sdcli.generation.resolve.fast import with_fast_preset
from sdcli.generation.resolve.inputs import Measure, input_values, pinned_embeddings
from sdcli.images.formats import MAX_PIXELS
from sdcli.models.model_defaults import size_problem
from sdcli.models.registry import ModelSpec
from sdcli.request.prompt_syntax import used
from sdcli.request.schedulers import SCHEDULERS, TRAINED, schedulers_for
from sdcli.request.schema import GenerationRequest, ResolvedRequest, check_needs, first_problem, watermark_room

DEFAULT_REFINER_START = 0.8
FEW_STEPS = 4
"""So many steps are all needed whole."""


def resolve(request: GenerationRequest, spec: ModelSpec, *, measure: Measure | None = None) -> ResolvedRequest:
    """The request as it will be generated: open fields get the model's defaults, and random seeds.

    With `measure`, the size of an init image is the default size. A field of a feature that is not used stays None.
    Raises UsageError for a field that would have no effect, and for what the model cannot do; Offline for the LoRA of a
    few-step preset that is not on this machine; and what reading the files of the request raises.
    """
    check_needs(request)
    request = with_fast_preset(request, spec)
    given = {name: value for name, value in request if value is not None}
    spec.family.check(given, model=spec.name)
    values = {**_defaults(request, spec), **given, **input_values(request, spec, measure), "model": spec.name}
    try:
        resolved = ResolvedRequest.model_validate(values)
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None
    for check in (_check_size, _check_process, _check_condition, _check_refiner):
        check(resolved, spec)
    if resolved.embeddings:
        resolved = resolved.model_copy(update={"embeddings": pinned_embeddings(resolved.embeddings)})
    for check in (_check_syntax, _check_steps, _check_inpainting, _check_watermark, _check_guidance, _check_reuse):
        check(resolved, spec)
    return resolved


def _defaults(request: GenerationRequest, spec: ModelSpec) -> dict[str, Any]:
    """A value for every field that an image needs, and for those that belong to a feature in use."""
    defaults: dict[str, Any] = {
        "negative_prompt": "",
        "prompt_template": spec.defaults.prompt_template,
        "prompt_syntax": "a1111" if spec.family.reads_text else "plain",
        "seed": secrets.randbelow(2**32),
        "width": spec.defaults.width,
        "height": spec.defaults.height,
        "steps": spec.defaults.steps,
        "guidance_scale": spec.defaults.guidance_scale,
        "scheduler": spec.defaults.scheduler,
        "eta": 0.0,
    }
    if request.refiner is not None:
        defaults["refiner_start"] = DEFAULT_REFINER_START
    if request.variation_strength is not None:
        defaults["variation_seed"] = secrets.randbelow(2**32)
    return defaults


def _check_size(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a size that the model cannot generate, before or after upscaling."""
    for side, pixels in zip(("width", "height"), request.final_size, strict=True):
        problem = size_problem(getattr(request, side), spec.kind) or size_problem(pixels, spec.kind)
        if problem is not None:
            raise UsageError(f"{side}: {problem}")
    width, height = request.final_size
    if width * height > MAX_PIXELS:
        raise UsageError(f"an image of {width}x{height} would have more than {MAX_PIXELS:,} pixels")


def _check_process(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a scheduler of another process than the model's."""
    process, scheduler = spec.family.process, request.scheduler
    if SCHEDULERS[scheduler].process != process:
        raise UsageError(
            f"the {scheduler} scheduler does not go with {spec.name}, which was trained {TRAINED[process]}; "
            f"those that do: {', '.join(schedulers_for(process))}"
        )


def _check_condition(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a prompt, a negative prompt or a guidance scale that the model cannot use."""
    kind, scale = spec.kind, request.guidance_scale
    if not spec.family.takes_prompt and (request.full_prompt or request.negative_prompt):
        text = request.full_prompt or request.negative_prompt
        raise UsageError(f"{spec.name} generates without a prompt; {text!r} would have no effect")
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


def _check_refiner(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for options that do not work with a refiner."""
    if request.refiner is None:
        return
    if not SCHEDULERS[request.scheduler].begins_anywhere:
        raise UsageError(
            f"the {request.scheduler} scheduler cannot begin in the middle, as a refiner does; use another"
        )
    if request.masked:
        raise UsageError("a refiner generates the whole image, so it goes without --mask and --extend")


def _check_syntax(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for AND without guidance, and for an embedding whose word is not in the prompts."""
    if request.prompt_syntax == "plain":
        return
    prompts = request.prompts[request.passes[0]]
    if prompts.weights and not request.guided:
        raise UsageError(f"AND needs guidance to have an effect; {request.guidance_scale:g} is off, use one above 1")
    words = [embedding.word for embedding in request.embeddings]
    unused = sorted(set(words) - used((*prompts.positive, *([prompts.negative] if request.guided else [])), words))
    if unused:
        raise UsageError(f"embeddings: no prompt has the word {unused[0]!r}, so its vectors would have no effect")


def _check_steps(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a pass, a control or a guidance interval that gets no step."""
    shares = (request.strength, request.upscale and request.upscale.strength)
    for name, share, steps in zip(("strength", "upscale"), shares, request.passes, strict=False):
        if steps < 1:
            raise UsageError(f"{name}: {share:g} of {request.steps} steps leaves no step to generate")
    counts = [SCHEDULERS[request.scheduler].calls(steps) for steps in request.passes]
    for one in request.controls:
        if not any(one.is_active(index, count) for count in counts for index in range(count)):
            raise UsageError(f"controls: {one.start:g}-{one.end:g} of {request.steps} steps leaves {one.model} no step")
    part = request.guidance_interval
    if part is not None and not any(part.indices(count) for count in counts):
        raise UsageError(f"guidance_interval: {part} of {request.steps} steps leaves guidance no step")


def _check_inpainting(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for an inpainting model without a mask."""
    if spec.kind.inpaints and not request.masked:
        raise UsageError(f"{spec.name} is an inpainting model; it needs --init-image, and --mask or --extend")


def _check_watermark(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for a watermark that is too long for the image."""
    width, height = request.final_size
    room = watermark_room(width, height)
    if request.watermark is not None and len(request.watermark.encode()) > room:
        raise UsageError(f"watermark: an image of {width}x{height} pixels has room for {room} bytes")


def _check_guidance(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for options of guidance without guidance, and for eta with a scheduler that ignores it."""
    for name in ("guidance_end", "guidance_rescale", "guidance_interval"):
        if getattr(request, name) is not None and not request.guided:
            raise UsageError(f"{name} has no effect at guidance scale {request.guidance_scale:g}; use one above 1")
    if request.eta and not SCHEDULERS[request.scheduler].uses_eta:
        raise UsageError(f"eta has no effect with the {request.scheduler} scheduler; only ddim uses it")


def _check_reuse(request: ResolvedRequest, spec: ModelSpec) -> None:
    """Raise UsageError for the reuse of features where each of few steps is needed whole."""
    if request.reuse is None or request.reuse == 1:
        return
    if request.scheduler == "lcm":
        raise UsageError("reuse does not go with the lcm scheduler, whose few steps are all needed whole")
    if spec.fast is not None and (spec.fast.lora is None or spec.fast.is_in(request)):
        raise UsageError(f"reuse does not go with {spec.fast.name}, whose few steps are all needed whole")
    steps = max(request.passes)
    if steps <= FEW_STEPS:
        raise UsageError(f"reuse needs more than {FEW_STEPS} steps, not {steps}: so few are all needed whole")
