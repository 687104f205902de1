"""The fields of AUTOMATIC1111's dialect as fields of sdcli's request; what cannot be honoured is refused by name."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from sdcli.errors import SdcliError
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.schedulers import AUTOMATIC, SCHEDULE_SUFFIXES, SCHEDULERS, scheduler_of_a1111, schedulers_for
from sdcli.request.schema import did_you_mean
from sdcli.server.a1111_models import Img2Img, Txt2Img
from sdcli.server.a1111_options import Options
from sdcli.server.model_names import check_model
from sdcli.server.native import ApiError
from sdcli.server.settings import ServerSettings

PIXEL_UPSCALERS, LATENT_UPSCALERS = ("None", "Lanczos"), ("Latent",)
"""What the second pass can enlarge with; without an upscaler the web UI resizes by Lanczos, too."""
SCHEDULE_LABELS = ("Automatic", "Uniform", *sorted({row.a1111_type for row in SCHEDULERS.values() if row.a1111_type}))
"""The schedule types that some sampler has."""
_SAME = ("", "None", "Use same sampler", "Use same scheduler", "Use same checkpoint", "Use same choices")


def refused(param: str, sentence: str, *, status: int = 400) -> ApiError:
    """The refusal of a field."""
    return ApiError(status, "not_found" if status == 404 else "bad_request", f"{param}: {sentence}", param=param)


_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "styles": (lambda value: not value, "this server has no styles; write them into the prompt"),
    "restore_faces": (lambda value: not value, "this server restores no faces"),
    "tiling": (lambda value: not value, "this server makes no images that tile"),
    "script_name": (lambda value: value in (None, "", "None"), "this server runs no scripts"),
    "script_args": (lambda value: not value, "this server runs no scripts"),
    "alwayson_scripts": (
        lambda value: not value,
        "this server runs no scripts; ControlNets are `controls` of a job of POST /v1/jobs",
    ),
    "comments": (lambda value: not value, "this server writes no comments into images"),
    "infotext": (lambda value: not value, "send the fields themselves"),
    "firstpass_image": (lambda value: not value, "this server takes no image of the first pass"),
    "disable_extra_networks": (lambda value: not value, "leave <lora:...> out of the prompt"),
    "seed_resize_from_w": (lambda value: value in (None, 0, -1), "this server resizes no seeds"),
    "seed_resize_from_h": (lambda value: value in (None, 0, -1), "this server resizes no seeds"),
    "firstphase_width": (lambda value: not value, "send the first size as width"),
    "firstphase_height": (lambda value: not value, "send the first size as height"),
    "s_min_uncond": (lambda value: not value, "every step is guided"),
    "s_churn": (lambda value: not value, "the samplers of this server have no churn"),
    "s_tmin": (lambda value: not value, "the samplers of this server have no churn"),
    "s_tmax": (lambda value: not value, "the samplers of this server have no churn"),
    "distilled_cfg_scale": (lambda value: value is None, "this server has no models with distilled guidance"),
    "hr_distilled_cfg": (lambda value: value is None, "this server has no models with distilled guidance"),
    "s_noise": (lambda value: value in (None, 1), "the samplers of this server add noise as they are defined"),
    "latent_mask": (lambda value: not value, "send mask"),
    "mask_round": (lambda value: value in (None, True), "masks have hard edges in the latent space"),
    "initial_noise_multiplier": (lambda value: value in (None, 1), "the noise of the first step is not scaled"),
    "hr_additional_modules": (lambda value: set(value or ()) <= set(_SAME), "the second pass has the same model"),
}
"""Field -> whether a value of it changes nothing, and why any other one is refused."""
_OF_SECOND_PASS: dict[str, str] = {
    "hr_checkpoint_name": "the second pass has the same model",
    "hr_sampler_name": "the second pass has the same sampler",
    "hr_scheduler": "the second pass has the same schedule",
}


def request_fields(body: Txt2Img, options: Options, registry: Registry, settings: ServerSettings) -> dict[str, Any]:
    """The fields of sdcli's request without images. Raises ApiError that names the field."""
    for name, (changes_nothing, why) in _UNSUPPORTED.items():
        value = getattr(body, name, None)
        if not changes_nothing(value):
            raise refused(name, why)
    scheduler = _scheduler(body, options, registry)
    named: dict[str, Any] = {
        "prompt": body.prompt or "",
        "negative_prompt": body.negative_prompt or None,
        "num_images": (body.batch_size or 1) * (body.n_iter or 1),
        "model": options.sd_model_checkpoint,
        "seed": None if body.seed == -1 else body.seed,
        "steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "scheduler": scheduler,
        "eta": _eta(body, scheduler, options, registry),
        "clip_skip": _clip_skip(body, options),
        **_variation(body),
        **_refiner(body, registry, settings),
        **(_second_pass(body) if body.enable_hr else {}),
    }
    return {name: value for name, value in named.items() if value is not None}


def _scheduler(body: Txt2Img, options: Options, registry: Registry) -> str | None:
    """Our name of sampler and schedule; None leaves it to the model."""
    name = body.sampler_name or body.sampler_index
    field = "sampler_name" if body.sampler_name else "sampler_index"
    schedule = body.scheduler or None
    if schedule is not None and schedule.lower() not in {label.lower() for label in SCHEDULE_LABELS}:
        known = ", ".join(SCHEDULE_LABELS)
        raise refused("scheduler", f"there is no schedule {schedule[:60]!r} here; there are {known}", status=404)
    if not name:
        if schedule is not None and schedule.lower() != "automatic":
            raise refused("scheduler", "is a part of a sampler; send sampler_name as well")
        return None
    labels = {row.a1111.lower(): row.a1111 for row in SCHEDULERS.values()}
    bare = name.lower()
    for suffix in SCHEDULE_SUFFIXES:
        bare = bare.removesuffix(f" {suffix.lower()}")
    if bare not in labels:
        hint = did_you_mean(name, labels.values())
        raise refused(field, f"Sampler not found: {name[:60]!r}{hint} (GET /sdapi/v1/samplers)", status=404)
    automatic = schedule is None or schedule.lower() == "automatic"
    found = scheduler_of_a1111(name, None if bare != name.lower() else "Automatic" if automatic else schedule)
    if found is None:
        sampler = labels[bare]
        meant = name[len(bare) :].strip() or (AUTOMATIC.get(sampler) if automatic else schedule)
        hint = "send Uniform" if scheduler_of_a1111(sampler) else "send Karras"
        raise refused("scheduler", f"{sampler} is not here with the schedule {meant}; {hint}")
    own = schedulers_for(_model(options, registry).family.process)
    return f"flow-{found}" if f"flow-{found}" in own else found


def _model(options: Options, registry: Registry) -> ModelSpec:
    try:
        return registry.find(options.sd_model_checkpoint)
    except SdcliError as error:
        raise refused("sd_model_checkpoint", str(error)) from None


def _eta(body: Txt2Img, scheduler: str | None, options: Options, registry: Registry) -> float | None:
    """eta of the one sampler that takes it; 1 is what ancestral samplers have, and it means nothing to the others."""
    if body.eta is None:
        return None
    row = SCHEDULERS[scheduler or _model(options, registry).defaults.scheduler]
    if row.uses_eta:
        return body.eta
    if row.stochastic and body.eta != 1:
        raise refused("eta", f"{row.a1111} has its noise as it is defined, which is 1")
    return None


def _clip_skip(body: Txt2Img, options: Options) -> int | None:
    """1 leaves it to the model: the web UI, too, takes the layer before the last of SDXL then."""
    layers = options.CLIP_stop_at_last_layers
    if body.clip_skip is not None:
        overridden = "CLIP_stop_at_last_layers" in (body.override_settings or {})
        if overridden and body.clip_skip != layers:
            raise refused("clip_skip", f"is {body.clip_skip}, and CLIP_stop_at_last_layers {layers}; send one of them")
        layers = body.clip_skip
    return None if layers == 1 else layers


def _variation(body: Txt2Img) -> dict[str, Any]:
    """The web UI's variation is ours: both mix two noises by spherical interpolation."""
    if not body.subseed_strength:
        return {}
    seed = {} if body.subseed in (None, -1) else {"variation_seed": body.subseed}
    return {"variation_strength": body.subseed_strength, **seed}


def _refiner(body: Txt2Img, registry: Registry, settings: ServerSettings) -> dict[str, Any]:
    name, start = body.refiner_checkpoint, body.refiner_switch_at
    if name in (None, "", "None"):
        return {}
    check_model(name, registry, settings, param="refiner_checkpoint")
    return {"refiner": name, **({} if start is None else {"refiner_start": start})}


def _second_pass(body: Txt2Img) -> dict[str, Any]:
    """The second pass of `enable_hr` as an upscale: both enlarge, and denoise a share of the same steps again."""
    for name, why in _OF_SECOND_PASS.items():
        if getattr(body, name) not in (None, *_SAME):
            raise refused(name, why)
    for name, first in {"hr_prompt": body.prompt, "hr_negative_prompt": body.negative_prompt}.items():
        if getattr(body, name) not in (None, "", first):
            raise refused(name, "the second pass has the same prompts")
    if body.hr_cfg not in (None, 0, body.cfg_scale):
        raise refused("hr_cfg", "the second pass has the same cfg_scale")
    if body.hr_second_pass_steps not in (None, 0, body.steps):
        raise refused("hr_second_pass_steps", "the second pass has the same steps; send 0")
    upscaler = body.hr_upscaler or "Latent"
    if upscaler not in (*PIXEL_UPSCALERS, *LATENT_UPSCALERS):
        known = ", ".join((*PIXEL_UPSCALERS, *LATENT_UPSCALERS))
        raise refused("hr_upscaler", f"there is no upscaler {upscaler[:60]!r} here; there are {known}", status=404)
    factor = 2.0 if body.hr_scale is None else body.hr_scale
    if body.hr_resize_x or body.hr_resize_y:
        factor = _factor_of_size(body)
    if not 1 < factor <= 8:
        raise refused("hr_scale", f"should be above 1 and at most 8, not {factor:g}")
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    if not strength:
        raise refused("denoising_strength", "at 0 the second pass has no step")
    how = "latent" if upscaler in LATENT_UPSCALERS else "pixel"
    return {"upscale": {"factor": factor, "strength": strength, "how": how}}


def _factor_of_size(body: Txt2Img) -> float:
    """The factor that hr_resize_x and hr_resize_y mean, where they keep the proportions."""
    pairs = [(body.hr_resize_x, body.width), (body.hr_resize_y, body.height)]
    factors = {wanted / side for wanted, side in pairs if wanted and side}
    if len(factors) != 1 or any(wanted and not side for wanted, side in pairs):
        raise refused("hr_resize_x", "with hr_resize_y it should enlarge width and height by the same factor")
    return factors.pop()


def all_seeds(body: Txt2Img, seeds: list[int], variations: list[int | None]) -> tuple[list[int], list[int]]:
    """(all_seeds, all_subseeds) of the images; without a variation the subseeds count up, and change nothing."""
    if all(one is not None for one in variations):
        return seeds, [one or 0 for one in variations]
    first = secrets.randbelow(2**32) if body.subseed in (None, -1) else body.subseed or 0
    return seeds, [first + number for number in range(len(seeds))]


def image_settings(body: Img2Img) -> dict[str, Any]:
    """The fields of the image and its mask that are numbers. Raises ApiError that names the field."""
    fields: dict[str, Any] = {"strength": 0.75 if body.denoising_strength is None else body.denoising_strength}
    if not fields["strength"]:
        raise refused("denoising_strength", "at 0 nothing would be generated")
    if body.enable_hr:
        raise refused("enable_hr", "goes with txt2img alone")
    if body.resize_mode not in (None, 0, 1):
        raise refused("resize_mode", "0 (stretch) and 1 (crop) are supported")
    if not body.mask:
        return fields
    blurs = {blur for blur in (body.mask_blur, body.mask_blur_x, body.mask_blur_y) if blur is not None}
    if len(blurs) > 1:
        raise refused("mask_blur_x", "the blur is the same in both directions; send mask_blur")
    if body.inpaint_full_res:
        raise refused(
            "inpaint_full_res", "only the whole picture is supported, not only the masked part of it; send false"
        )
    if body.inpainting_fill not in (None, 0, 1):
        raise refused("inpainting_fill", "0 (fill) and 1 (original) are supported")
    return {**fields, "mask_blur": blurs.pop() if blurs else 4}
