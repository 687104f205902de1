"""What the record of another tool says (A1111, ComfyUI ...): a request where it maps, plain data where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdcli.errors import UsageError
from sdcli.io.json_files import parse_json
from sdcli.request.schema import NEEDS, GenerationRequest, parse_request

Tool = Literal["a1111", "comfyui", "invokeai", "swarmui", "fooocus", "novelai", "easy-diffusion", "draw-things"]


@dataclass(frozen=True)
class ToolRecord:
    """`request` holds the fields that map to ours; `unmapped` holds everything else, JSON-ready.

    The prompt is the text that the tool's model saw, so its template is always the bare `{prompt}`. The tool's model
    never becomes the request's model: its name says nothing about what is installed here.
    """

    tool: Tool
    request: GenerationRequest | None
    unmapped: dict[str, Any]


def mapped_request(found: dict[str, Any], unmapped: dict[str, Any]) -> GenerationRequest | None:
    """A request of the valid fields, or None where there is none.

    Invalid ones, and those without an effect because what they need is not there, are added to `unmapped`.
    """
    valid = {}
    for field, value in found.items():
        try:
            if isinstance(value, bool):
                raise UsageError(f"{field}: should not be a boolean")
            if isinstance(value, float) and value.is_integer():  # in JSON a whole number may be written as 20.0
                value = int(value)
            side = getattr(parse_request({field: value}), field)
            if field in ("width", "height") and side % 8:  # all these tools generate on the latents of a VAE
                raise UsageError(f"{field}: should be a multiple of 8, not {side}")
            valid[field] = value
        except UsageError:
            unmapped[field] = value
    for field, others in NEEDS.items():
        if field in valid and not valid.keys() & set(others):
            unmapped[field] = valid.pop(field)
    return parse_request({**valid, "prompt_template": "{prompt}"}) if valid else None


def taken(unmapped: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Take the entries that a tool calls by other names (its name -> ours) out of `unmapped`; None is no value."""
    found: dict[str, Any] = {}
    for name, field in fields.items():
        if unmapped.get(name) is not None and field not in found:
            found[field] = unmapped.pop(name)
    return found


def convert_prompts(found: dict[str, Any], convert: Callable[[str], tuple[str, list[str]]]) -> list[str]:
    """Replace both prompts by what `convert` makes of them; returns what it keeps as text."""
    kept: list[str] = []
    for field in ("prompt", "negative_prompt"):
        if isinstance(found.get(field), str):
            found[field], more = convert(found[field])
            kept += more
    return kept


def name_syntax(unmapped: dict[str, Any], kept: Iterable[str], *, why: str = "") -> None:
    """Name the signs that mean something in the tool's prompts, or in ours, and are text in the converted ones."""
    if signs := ", ".join(dict.fromkeys(kept)):
        unmapped["prompt syntax"] = f"kept as text{why}: {signs}"


def loras_of(pairs: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]] | None:
    """Names of LoRA files and their weights as entries of a request; None if one is no name or no number."""
    entries = []
    for name, weight in pairs:
        if not isinstance(name, str) or not name.strip() or isinstance(weight, bool):
            return None
        try:
            number = float(weight)
        except (TypeError, ValueError):
            return None
        entries.append({"path": name.strip(), "unet_weight": number, "text_weight": number})
    return entries


def json_object(text: str) -> dict[str, Any] | None:
    """The object in a JSON text; None for invalid JSON and for any other value. NaN and Infinity become their names."""
    try:
        value = parse_json(text, strict=True, finite=False)
    except ValueError:
        return None
    return _finite(value) if isinstance(value, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
