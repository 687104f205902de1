"""The record that Easy Diffusion writes: a PNG chunk for each setting, or JSON in the UserComment of JPEG and WebP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcli.metadata.image_texts import USER_COMMENT
from sdcli.metadata.tool_record import ToolRecord, convert_prompts, json_object, mapped_request, name_syntax, taken
from sdcli.metadata.weighted_text import literal, meanings

_KEYS = {
    "prompt": "prompt",
    "Prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "Negative Prompt": "negative_prompt",
    "seed": "seed",
    "Seed": "seed",
    "num_inference_steps": "steps",
    "Steps": "steps",
    "guidance_scale": "guidance_scale",
    "Guidance Scale": "guidance_scale",
    "width": "width",
    "Width": "width",
    "height": "height",
    "Height": "height",
}
"""Easy Diffusion's keys, of both of its spellings -> ours."""
_SAMPLERS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "pndm",
    "euler": "euler",
    "euler_a": "euler-a",
    "heun": "heun",
    "lms": "lms",
    "lcm": "lcm",
}


def read_easy_diffusion(texts: Mapping[str, str]) -> ToolRecord | None:
    """Read the settings by the names of Easy Diffusion; None where the model or the steps are not among them."""
    record: dict[str, Any] = json_object(texts.get(USER_COMMENT, "")) or dict(texts)
    if not record.keys() & {"use_stable_diffusion_model", "Stable Diffusion model"}:
        return None
    if not record.keys() & {"num_inference_steps", "Steps"}:
        return None
    unmapped = {
        key: value
        for key, value in record.items()
        if value not in (None, "", [], "[]") and (value != "None" or key.lower().endswith("prompt"))
    }
    found = taken(unmapped, _KEYS)
    kept = convert_prompts(found, _plain)
    for key in ("sampler_name", "Sampler"):
        if (scheduler := _SAMPLERS.get(str(unmapped.get(key)))) and not unmapped.keys() & {
            "scheduler_name",
            "Scheduler",
        }:
            found["scheduler"] = scheduler
            del unmapped[key]
    for key in ("clip_skip", "Clip Skip"):
        if key in unmapped and str(unmapped[key]) == "False":
            del unmapped[key]
    name_syntax(unmapped, kept, why=", for it differs between versions")
    return ToolRecord("easy-diffusion", mapped_request(found, unmapped), unmapped)


def _plain(text: str) -> tuple[str, list[str]]:
    """A prompt as plain text, and the signs in it that are weights in some versions."""
    return literal(text), meanings(text) + [sign for sign in ("++", "--") if sign in text]
