"""The record that NovelAI writes into PNG chunks (`Comment`, JSON), or hides in an image's transparency."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdcli.metadata.tool_record import ToolRecord, convert_prompts, json_object, mapped_request, name_syntax, taken
from sdcli.metadata.weighted_text import MAX_TEXT, Spans, literal, meanings, weighted

STRONGER, WEAKER = 1.05, 1 / 1.05


def read_novelai(texts: Mapping[str, str]) -> ToolRecord | None:
    """Read `Comment` beside `Software: NovelAI`; None for anything else."""
    if not texts.get("Software", "").startswith("NovelAI"):
        return None
    record = json_object(texts.get("Comment", ""))
    if record is None:
        return None
    unmapped: dict[str, Any] = {key: value for key, value in record.items() if value is not None}
    unmapped |= {key: text for key, text in texts.items() if key not in ("Comment", "Description", "Software")}
    unmapped.setdefault("prompt", texts.get("Description"))
    names = {"prompt": "prompt", "uc": "negative_prompt", "scale": "guidance_scale"}
    found = taken(unmapped, names | {name: name for name in ("seed", "steps", "width", "height")})
    unmapped = {key: value for key, value in unmapped.items() if value is not None}
    kept = convert_prompts(found, converted)
    schedule = unmapped.get("noise_schedule", "native")
    scheduler = _SCHEDULERS.get((str(unmapped.get("sampler")), str(schedule)))
    if scheduler is not None and not unmapped.get("sm"):
        found["scheduler"] = scheduler
        unmapped.pop("sampler")
        unmapped.pop("noise_schedule", None)
    name_syntax(unmapped, kept)
    return ToolRecord("novelai", mapped_request(found, unmapped), unmapped)


_SCHEDULERS = {
    ("ddim", "native"): "ddim",
    ("plms", "native"): "pndm",
    ("k_euler", "native"): "euler",
    ("k_euler_ancestral", "native"): "euler-a",
    ("k_lms", "native"): "lms",
    ("k_heun", "native"): "heun",
    ("k_dpmpp_2m", "native"): "dpmpp-2m",
    ("k_dpmpp_2m", "karras"): "dpmpp-2m-karras",
}
"""NovelAI's `sampler` and `noise_schedule` -> the scheduler of sdcli. `sm` (SMEA) changes the sampler."""

_WEIGHT = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)::(.*?)(?:::|$)", re.DOTALL)


def converted(text: str) -> tuple[str, list[str]]:
    """A prompt of NovelAI in sdcli's syntax, and what is only text here.

    `{word}` is 1.05, `[word]` 1/1.05, brackets within brackets multiply, and `1.5::some words::` is a weight.
    """
    if len(text) > MAX_TEXT:
        return literal(text), ["all of it: it is too long"]
    spans: Spans = []
    position = 0
    for match in _WEIGHT.finditer(text):
        spans += _bracketed(text[position : match.start()])
        spans += [(piece, weight * float(match[1])) for piece, weight in _bracketed(match[2])]
        position = match.end()
    spans += _bracketed(text[position:])
    return weighted(spans), meanings(text, ("AND", "BREAK", "<name:>"))


def _bracketed(text: str) -> Spans:
    """The pieces of a text with the weights of their brackets; a bracket without its other end is text."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"[{}\[\]]", text):
        if match[0] in "{[":
            opened.append(match.start())
        elif opened and text[opened[-1]] + match[0] in ("{}", "[]"):
            ends[opened.pop()] = match.start()
    factors = {start: STRONGER if text[start] == "{" else WEAKER for start in ends}
    factors |= {end: 1 / factors[start] for start, end in ends.items()}
    spans: Spans = []
    weight, begin = 1.0, 0
    for place in sorted(factors):
        spans.append((text[begin:place], round(weight, 6)))
        weight, begin = weight * factors[place], place + 1
    return [*spans, (text[begin:], round(weight, 6))]
