"""The `parameters` text of A1111's web UI (also Forge, SD.Next, Civitai ...), written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from sdcli.errors import UsageError
from sdcli.metadata.tool_record import ToolRecord, json_object, mapped_request
from sdcli.request.fields import LoraRef
from sdcli.request.lora_tags import tag, take_tags
from sdcli.request.schedulers import SCHEDULERS
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
        "Schedule type": row and (row.a1111_type or ("Uniform" if row.a1111 in _AUTOMATIC else "Automatic")),
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
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    prompt = " ".join([request.full_prompt, *map(tag, request.loras)])
    return f"{prompt}{negative}\n{line}".strip()


def parse_a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """`parameters` text -> prompt, negative prompt, and the last line's pairs, by the web UI's rules.

    The last line holds parameters only if at least 3 pairs match. The text is ambiguous and loses, here as in the web
    UI: white space around each line, blank lines at the start of a prompt, and the sign of a prompt's line that itself
    begins with `Negative prompt:` (everything after it counts as negative). sdcli's own record is exact.
    """
    *lines, last = text.strip().split("\n")
    pairs = list(_pairs(last))
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative = True
            line = line.removeprefix("Negative prompt:").strip()
        if line or prompts[negative]:
            prompts[negative].append(line)
    return "\n".join(prompts[0]), "\n".join(prompts[1]), {key: _unquote(value) for key, value in pairs if value}


def read_a1111(text: str) -> ToolRecord | None:
    """Read a `parameters` text. None for a JSON object, which is another tool's record."""
    if text.lstrip().startswith("{") and json_object(text) is not None:
        return None
    prompt, negative, pairs = parse_a1111(text)
    unmapped: dict[str, Any] = dict(pairs)
    loras: tuple[LoraRef, ...] = ()
    try:
        prompt, loras = take_tags(prompt)
    except UsageError as error:
        unmapped["lora"] = str(error)
    found: dict[str, Any] = {"prompt": prompt, **({"loras": [ref.model_dump() for ref in loras]} if loras else {})}
    if negative or pairs:
        found["negative_prompt"] = negative
    for key, field in _NUMBERS.items():
        if key in unmapped:
            found[field] = unmapped.pop(key)
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", pairs.get("Size", "")):
        del unmapped["Size"]
        found |= {"width": match[1], "height": match[2]}
    scheduler = _scheduler(pairs.get("Sampler", ""), pairs.get("Schedule type"))
    if scheduler is not None:
        found["scheduler"] = scheduler
        unmapped = {key: value for key, value in unmapped.items() if key not in ("Sampler", "Schedule type")}
        if "Eta" in unmapped and SCHEDULERS[scheduler].uses_eta:
            found["eta"] = unmapped.pop("Eta")
    return ToolRecord("a1111", mapped_request(found, unmapped), unmapped)


_NUMBERS = {
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
}
_AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
"""What `Schedule type: Automatic` means, for the samplers where it does not mean evenly spaced steps."""

_SCHEDULERS = {(row.a1111.lower(), row.a1111_type): name for name, row in SCHEDULERS.items()}


def _scheduler(sampler: str, schedule_type: str | None) -> str | None:
    """Our name of A1111's pair; older texts have the type in the sampler's name (`DPM++ 2M Karras`), or none."""
    if schedule_type is None:
        for suffix in ("Karras", "Exponential"):
            if sampler.endswith(f" {suffix}"):
                sampler, schedule_type = sampler.removesuffix(f" {suffix}"), suffix
    elif schedule_type == "Automatic":
        schedule_type = _AUTOMATIC.get(sampler)
    elif schedule_type in ("Uniform", "Normal"):
        schedule_type = None
    return _SCHEDULERS.get((sampler.lower(), schedule_type))


_RUN = re.compile(r"([\w \-/]+)(:?)")
_VALUE = re.compile(r"""\s*(?:(?P<quoted>"(?:[^\\"]|\\.)+")|(?P<bare>[^,]*))(?:,|$)""")


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The `Key: value` pairs of a line: a key is a word character, then words, spaces, `-` and `/`.

    Takes linear time: the web UI's single expression for a whole pair takes quadratic time on a long line without a
    colon, minutes for a hostile image.
    """
    position = 0
    while run := _RUN.search(line, position):
        position = run.end()
        key = run[1].lstrip(" -/")
        if run[2] and len(key) > 1 and (value := _VALUE.match(line, position)):
            yield key, value["quoted"] or value["bare"]
            position = value.end()


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def _shortest(number: float | None) -> float | int | None:
    return int(number) if number is not None and float(number).is_integer() else number


def _model(model: str) -> str:
    """A model's name as the web UI writes it: its file's name without suffix, comma and colon."""
    name = PurePath(model).name if PurePath(model).is_absolute() else model
    return name.removesuffix(".safetensors").replace(",", "").replace(":", "")
