"""The records that InvokeAI writes into images, of version 3 and later and of version 2."""

from __future__ import annotations

import re
from typing import Any

from sdcli.metadata.tool_record import ToolRecord, json_object, mapped_request


def read_invokeai(text: str) -> ToolRecord | None:
    """Read `invokeai_metadata` (version 3 and later). None for anything else."""
    record = json_object(text)
    if record is None or not record.keys() & {"positive_prompt", "seed", "generation_mode"}:
        return None
    return _invokeai(record, prompt="positive_prompt", sampler="scheduler")


def read_old_invokeai(text: str) -> ToolRecord | None:
    """Read `sd-metadata` (version 2), where the [bracketed] parts of the prompt are the negative prompt."""
    record = json_object(text)
    image = record.get("image") if record is not None else None
    if record is None or not isinstance(image, dict):
        return None
    prompt = image.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("prompt")
    if isinstance(prompt, str):
        negative = " ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
        image = {**image, "prompt": re.sub(r"\[[^\[\]]*\]", "", prompt).strip(), "negative_prompt": negative}
    outer = {key: value for key, value in record.items() if key != "image"}
    return _invokeai({**outer, **image}, prompt="prompt", sampler="sampler")


_SCHEDULERS = {
    "ddpm": "ddpm",
    "ddim": "ddim",
    "pndm": "pndm",
    "plms": "pndm",
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler-a",
    "k_euler_a": "euler-a",
    "heun": "heun",
    "k_heun": "heun",
    "dpmpp_2m": "dpmpp-2m",
    "k_dpmpp_2": "dpmpp-2m",
    "dpmpp_2m_k": "dpmpp-2m-karras",
    "dpmpp_2m_sde": "dpmpp-2m-sde",
    "unipc": "unipc",
    "lms": "lms",
    "k_lms": "lms",
    "lcm": "lcm",
}


def _invokeai(record: dict[str, Any], *, prompt: str, sampler: str) -> ToolRecord:
    """A record of either version; most of its fields have our names."""
    unmapped = {key: value for key, value in record.items() if value is not None}
    fields = {prompt: "prompt", "negative_prompt": "negative_prompt", "cfg_scale": "guidance_scale"}
    fields |= {name: name for name in ("seed", "steps", "width", "height")}
    found = {field: unmapped.pop(key) for key, field in fields.items() if key in unmapped}
    scheduler = _SCHEDULERS.get(str(unmapped.get(sampler)))
    if scheduler is not None:
        found["scheduler"] = scheduler
        del unmapped[sampler]
    return ToolRecord("invokeai", mapped_request(found, unmapped), unmapped)
