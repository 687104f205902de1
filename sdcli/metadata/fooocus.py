"""The record that Fooocus writes in its own scheme, a JSON object; its other scheme is A1111's text."""

from __future__ import annotations

import re
from typing import Any

from sdcli.metadata.comfyui.sampling import take_scheduler
from sdcli.metadata.comfyui.syntax import comfyui_text
from sdcli.metadata.tool_record import ToolRecord, json_object, loras_of, mapped_request, taken

_KEYS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "guidance_scale": "guidance_scale",
    "clip_skip": "clip_skip",
}
_LABELS = {
    "Prompt": "prompt", "Negative Prompt": "negative_prompt", "Seed": "seed", "Steps": "steps",
    "Guidance Scale": "guidance_scale", "CLIP Skip": "clip_skip", "Resolution": "resolution", "Sampler": "sampler",
    "Scheduler": "scheduler", "Styles": "styles", "Performance": "performance", "Base Model": "base_model",
}  # fmt: skip
"""The names in records of versions before 2.2."""


def read_fooocus(text: str) -> ToolRecord | None:
    """Read Fooocus' JSON; None for anything else."""
    record = json_object(text)
    if record is None:
        return None
    record = {_LABELS.get(key, key): value for key, value in record.items()}
    if not record.keys() >= {"prompt", "base_model"} or not record.keys() & {
        "performance",
        "metadata_scheme",
        "styles",
    }:
        return None
    unmapped: dict[str, Any] = {key: value for key, value in record.items() if value not in (None, "", [])}
    _take_whole_prompts(unmapped)
    found = taken(unmapped, _KEYS)
    for field in ("prompt", "negative_prompt"):
        if isinstance(found.get(field), str):
            found[field], kept = comfyui_text(found[field])
            if kept:
                unmapped[f"{field}: syntax"] = f"kept as text: {', '.join(kept)}"
    if size := re.fullmatch(r"\(?'?(\d{1,5})'?\s*[,x×*]\s*'?(\d{1,5})'?\)?", str(unmapped.get("resolution"))):
        del unmapped["resolution"]
        found |= {"width": size[1], "height": size[2]}
    listed = unmapped.get("loras")
    if isinstance(listed, list) and all(isinstance(one, list) and len(one) == 3 for one in listed):
        loras = loras_of((name, weight) for name, weight, _digest in listed)
        if loras:
            found["loras"] = loras
            unmapped = {key: value for key, value in unmapped.items() if not re.match(r"loras$|lora_combined_\d", key)}
    take_scheduler(found, unmapped)
    return ToolRecord("fooocus", mapped_request(found, unmapped), unmapped)


def _take_whole_prompts(unmapped: dict[str, Any]) -> None:
    """The prompts that the model saw, with the texts of the styles, in place of those that were typed."""
    for name in ("prompt", "negative_prompt"):
        whole = unmapped.get(f"full_{name}")
        if isinstance(whole, list) and whole and all(isinstance(part, str) for part in whole):
            del unmapped[f"full_{name}"]
            typed = unmapped.get(name, "")
            unmapped[name] = ", ".join(part for part in whole if part)
            if typed and typed != unmapped[name]:
                unmapped[f"{name} as typed"] = typed
