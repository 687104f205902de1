"""The `parameters` text of A1111's web UI (also Forge, SD.Next, Civitai ...), written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from sdcli.metadata.a1111_text import A1111Text, split_a1111
from sdcli.metadata.comfyui.syntax import comfyui_text
from sdcli.metadata.invokeai_prompt import converted as compel
from sdcli.metadata.tool_record import ToolRecord, mapped_request, name_syntax, taken
from sdcli.metadata.weighted_text import literal, meanings, untagged, without_editing
from sdcli.request.fields import LoraRef
from sdcli.request.lora_tags import read_tags, tag
from sdcli.request.schedulers import AUTOMATIC, SCHEDULERS, scheduler_of_a1111
from sdcli.request.schema import GenerationRequest


def a1111_text(
    request: GenerationRequest,
    *,
    version: str,
    model_hash: str | None = None,
    lora_hashes: Mapping[str, str] | None = None,
) -> str:
    """The `parameters` text of a request as generated, as the web UI writes it; LoRAs are tags after the prompt.

    `model_hash` is the first 10 hex digits of the weights' SHA-256; `lora_hashes` maps each LoRA's name to the first 12
    of its tensors'. Whole numbers have no point, as those of the web UI's sliders (7, not 7.0). `Schedule type` is
    Automatic where the web UI would choose the same one by itself.
    """
    row = SCHEDULERS[request.scheduler] if request.scheduler is not None else None
    pairs = {
        "Steps": request.steps,
        "Sampler": row and row.a1111,
        "Schedule type": row and (row.a1111_type or ("Uniform" if row.a1111 in AUTOMATIC else "Automatic")),
        "CFG scale": _shortest(request.guidance_scale),
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Clip skip": request.clip_skip if request.clip_skip != 1 else None,
        "Model hash": model_hash,
        "Model": request.model and _model(request.model),
        "Variation seed": request.variation_seed,
        "Variation seed strength": _shortest(request.variation_strength),
        "Denoising strength": _shortest(request.upscale.strength if request.upscale else request.strength),
        "Mask blur": _shortest(request.mask_blur),
        "Hires upscale": _shortest(request.upscale.factor if request.upscale else None),
        "Eta": _shortest(request.eta) if row and row.uses_eta and request.eta else None,
        "Refiner": request.refiner and _model(request.refiner),
        "Refiner switch at": _shortest(request.refiner_start),
        "RNG": "CPU",
        "Lora hashes": ", ".join(f"{name}: {digest}" for name, digest in (lora_hashes or {}).items()) or None,
        "Version": f"sdcli {version}",
    }
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in pairs.items() if value is not None)
    written = literal if request.prompt_syntax == "plain" else str
    negative = f"\nNegative prompt: {written(request.negative_prompt)}" if request.negative_prompt else ""
    prompt = " ".join([written(request.full_prompt), *map(tag, request.loras)])
    return f"{prompt}{negative}\n{line}".strip()


def parse_a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """`parameters` text -> prompt, negative prompt, and the parameters; see `split_a1111`."""
    found = split_a1111(text)
    return found.prompt, found.negative, found.pairs


def read_a1111(text: str) -> ToolRecord | None:
    """Read a `parameters` text. None for JSON, which is another tool's record."""
    parts = split_a1111(text)
    if _JSON.match(text) and not parts.is_record:
        return None
    return _record(parts)


def read_a1111_elsewhere(text: str) -> ToolRecord | None:
    """Read a text of a place where anything may stand, such as a comment; None unless it holds A1111's parameters."""
    parts = split_a1111(text)
    return _record(parts) if parts.is_record else None


_JSON = re.compile(r'\s*(?:\{\s*["}]|\[\s*[\[{"\]])')


def _record(parts: A1111Text) -> ToolRecord:
    pairs = parts.pairs
    unmapped: dict[str, Any] = dict(pairs)
    unmapped |= {f"{key} (given before)": value for key, value in parts.repeated.items()}
    for label, text in parts.after.items():
        unmapped[f"{label} (behind the parameters)" if label in pairs else label] = text
    prompt, negative, loras = _prompts(parts, unmapped)
    found: dict[str, Any] = {"prompt": prompt, **({"loras": [ref.model_dump() for ref in loras]} if loras else {})}
    if negative or pairs:
        found["negative_prompt"] = negative
    found |= taken(unmapped, _NUMBERS)
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", pairs.get("Size", "")):
        del unmapped["Size"]
        found |= {"width": match[1], "height": match[2]}
    scheduler = _scheduler_of(pairs)
    if scheduler is not None:
        found["scheduler"] = scheduler
        for key in ("Sampler", "Schedule type", *(["Scheduler"] if _is_fooocus(pairs) else [])):
            unmapped.pop(key, None)
        if "Eta" in unmapped and SCHEDULERS[scheduler].uses_eta:
            found["eta"] = unmapped.pop("Eta")
    return ToolRecord("a1111", mapped_request(found, unmapped), unmapped)


def _prompts(parts: A1111Text, unmapped: dict[str, Any]) -> tuple[str, str, tuple[LoraRef, ...]]:
    """The prompts in our syntax and without tags, and the LoRAs of the tags; what has no counterpart is named."""
    prompt, loras = _without_tags(parts.prompt, unmapped)
    negative = untagged(parts.negative)  # the web UI reads no tags there
    kept: list[str] = []
    parser = parts.pairs.get("Parser", "").lower()
    if _is_cpp(parts.pairs):
        (prompt, kept), (negative, others) = without_editing(prompt), without_editing(negative)
        kept = [*kept, *others]
    elif parser == "compel":  # SD.Next
        first, second = compel(prompt), compel(negative)
        prompt, negative, kept = first.text, second.text, [*first.kept, *second.kept]
    elif parser == "fixed":  # SD.Next without syntax
        kept = [*meanings(prompt), *meanings(negative)]
        prompt, negative = literal(prompt), literal(negative)
    elif _is_fooocus(parts.pairs):
        (prompt, kept), (negative, others) = comfyui_text(prompt), comfyui_text(negative)
        kept = [*kept, *others]
    name_syntax(unmapped, kept)
    return prompt, negative, loras


def _without_tags(prompt: str, unmapped: dict[str, Any]) -> tuple[str, tuple[LoraRef, ...]]:
    """A prompt without the web UI's tags, and the LoRAs that they name; each other tag is named with the reason."""
    loras: list[LoraRef] = []
    refused: list[str] = []
    while True:  # what is left around a tag may be a tag, too
        tags = read_tags(prompt)
        loras += tags.loras
        refused += tags.refused
        if tags.text == prompt:
            break
        prompt = tags.text
    for key, kind in {"lora": True, "tags": False}.items():
        sentences = [one for one in dict.fromkeys(refused) if one.startswith(("<lora:", "<lyco:")) is kind]
        if sentences:
            unmapped[key] = "; ".join(sentences)
    return prompt, tuple(loras)


def _is_cpp(pairs: Mapping[str, str]) -> bool:
    return pairs.get("Version", "").startswith("stable-diffusion.cpp")


def _is_fooocus(pairs: Mapping[str, str]) -> bool:
    return pairs.get("Version", "").startswith("Fooocus")


_NUMBERS = {
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "Variation strength": "variation_strength",
}
"""A1111's names -> ours; `Variation strength` is SD.Next's."""
_CPP = {
    "euler": "euler",
    "euler_a": "euler-a",
    "heun": "heun",
    "dpm++2m": "dpmpp-2m",
    "dpm++2m karras": "dpmpp-2m-karras",
    "lcm": "lcm",
}
"""stable-diffusion.cpp's samplers; `discrete` behind one is the usual schedule."""


_OWN_SCHEDULE = {"Sampler sigma", "Sampler spacing", "Sampler timesteps", "Sampler beta schedule", "Sampler type"}
"""SD.Next's parameters that make another schedule of a sampler."""


def _scheduler_of(pairs: Mapping[str, str]) -> str | None:
    """Our name of the sampler and its schedule; None where one of them has no counterpart."""
    sampler = pairs.get("Sampler", "")
    if _is_cpp(pairs):
        return _CPP.get(sampler.removesuffix(" discrete"))
    if _is_fooocus(pairs):  # the sampler's name contains the schedule only in part
        usual = "karras" if sampler.endswith(" Karras") else "normal"
        return scheduler_of_a1111(sampler) if pairs.get("Scheduler", usual) == usual else None
    if pairs.keys() & _OWN_SCHEDULE:
        return None
    return scheduler_of_a1111(sampler, pairs.get("Schedule type"))


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value


def _shortest(number: float | None) -> float | int | None:
    return int(number) if number is not None and float(number).is_integer() else number


def _model(model: str) -> str:
    """A model's name as the web UI writes it: its file's name without suffix, comma and colon."""
    name = PurePath(model).name if PurePath(model).is_absolute() else model
    return name.removesuffix(".safetensors").replace(",", "").replace(":", "")
