"""The record that SwarmUI writes: JSON with `sui_image_params`, in `parameters` of a PNG or in EXIF's UserComment."""

from __future__ import annotations

import re
from typing import Any

from sdcli.metadata.comfyui.sampling import take_scheduler
from sdcli.metadata.comfyui.syntax import comfyui_text
from sdcli.metadata.tool_record import ToolRecord, json_object, loras_of, mapped_request, taken
from sdcli.request.lora_tags import read_tags

_KEYS = {
    "prompt": "prompt",
    "negativeprompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfgscale": "guidance_scale",
    "width": "width",
    "height": "height",
    "variationseed": "variation_seed",
    "variationseedstrength": "variation_strength",
}
_ASIDE = re.compile(r"<(segment|object|region|extend|refiner|base|edit|video|clear|videoswap)\b[^<>]*>.*", re.DOTALL)
"""What follows one of these belongs to a part of the image, or to another pass."""
_TAG = re.compile(r"<(\w+)(?:\[[^\]]*\])?(?::[^<>]*)?>")


def read_swarmui(text: str) -> ToolRecord | None:
    """Read SwarmUI's JSON; None for anything else."""
    record = json_object(text)
    params = record.get("sui_image_params") if record is not None else None
    if record is None or not isinstance(params, dict):
        return None
    unmapped: dict[str, Any] = {key: value for key, value in params.items() if value not in (None, "", [])}
    found = taken(unmapped, _KEYS)
    for field in ("prompt", "negative_prompt"):
        if isinstance(found.get(field), str):
            found[field] = _converted(found[field], field, found, unmapped)
    take_scheduler(found, unmapped)
    _take_loras(found, unmapped)
    unmapped |= {key: value for key, value in record.items() if key != "sui_image_params" and value not in ({}, [], "")}
    return ToolRecord("swarmui", mapped_request(found, unmapped), unmapped)


def _converted(text: str, field: str, found: dict[str, Any], unmapped: dict[str, Any]) -> str:
    """A prompt without SwarmUI's tags; those that ask for something are named."""
    if aside := _ASIDE.search(text):
        unmapped[f"{field}: {aside[1]}"] = aside[0]
        text = text[: aside.start()].rstrip()
    named: list[str] = []

    def replaced(tag: re.Match[str]) -> str:
        if tag[1] == "break":
            return "\0"
        if tag[1] == "lora" and field == "prompt" and "loras" not in unmapped and tag[0].count(":") == 2:
            tags = read_tags(tag[0])
            found.setdefault("loras", []).extend(ref.model_dump() for ref in tags.loras)
            named.extend(tags.refused)
        elif tag[1] != "comment":
            named.append(tag[0])
        return ""

    text = _TAG.sub(replaced, text).strip()
    if named:
        unmapped[f"{field}: tags"] = named
    parts = [comfyui_text(part) for part in text.split("\0")]
    kept = dict.fromkeys(sign for _, signs in parts for sign in signs)
    if kept:
        unmapped[f"{field}: syntax"] = f"kept as text: {', '.join(kept)}"
    return " BREAK ".join(part for part, _ in parts)


def _take_loras(found: dict[str, Any], unmapped: dict[str, Any]) -> None:
    """The lists `loras` and `loraweights` as LoRAs by name, if they are equally long and nothing narrows them."""
    names, weights = unmapped.get("loras"), unmapped.get("loraweights")
    names = names.split(",") if isinstance(names, str) else names
    weights = weights.split(",") if isinstance(weights, str) else weights
    if not isinstance(names, list) or not isinstance(weights, list) or len(names) != len(weights):
        return
    if unmapped.keys() & {"lorasectionconfinement", "loratencweights"}:
        return
    loras = loras_of(zip(names, weights, strict=True))
    if loras is not None:
        found["loras"] = loras
        del unmapped["loras"], unmapped["loraweights"]
