"""The record that Draw Things writes into XMP, as JSON in `exif:UserComment`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdcli.metadata.image_texts import XMP_COMMENT
from sdcli.metadata.tool_record import ToolRecord, convert_prompts, json_object, mapped_request, name_syntax, taken
from sdcli.metadata.weighted_text import without_editing
from sdcli.request.schedulers import scheduler_of_a1111


def read_draw_things(texts: Mapping[str, str]) -> ToolRecord | None:
    """Read the JSON with `c` (the prompt) and `uc` (the negative one); None for anything else."""
    record = json_object(texts.get(XMP_COMMENT, ""))
    if record is None or not isinstance(record.get("c"), str) or not record.keys() & {"uc", "v2", "seed", "steps"}:
        return None
    unmapped: dict[str, Any] = {key: value for key, value in record.items() if value not in (None, "", [])}
    unmapped |= {key: text for key, text in texts.items() if not key.startswith("XMP ")}
    names = {"c": "prompt", "uc": "negative_prompt", "scale": "guidance_scale", "seed": "seed", "steps": "steps"}
    found = {"prompt": record["c"], **taken(unmapped, names)}
    kept = convert_prompts(found, without_editing)
    if size := re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(unmapped.get("size"))):
        del unmapped["size"]
        found |= {"width": size[1], "height": size[2]}
    scheduler = scheduler_of_a1111(str(unmapped.get("sampler")))  # the names are A1111's older ones
    if scheduler is not None:
        del unmapped["sampler"]
        found["scheduler"] = scheduler
    name_syntax(unmapped, kept)
    return ToolRecord("draw-things", mapped_request(found, unmapped), unmapped)
