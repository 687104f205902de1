"""A ComfyUI graph -> the settings of the saved image: every field is taken over, or named."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

from sdcli.io.json_files import parse_json
from sdcli.metadata.comfyui.conditioning import read_prompt, settle_encoders, take_prompt
from sdcli.metadata.comfyui.graph import Graph, Node, chains, is_sampler
from sdcli.metadata.comfyui.latents import read_second_pass, read_size
from sdcli.metadata.comfyui.models import read_models
from sdcli.metadata.comfyui.reading import Reading, shown
from sdcli.metadata.comfyui.sampling import FLOW_NODES, guided_by, is_full, read_sampling, sampler_of
from sdcli.metadata.comfyui.values import Values
from sdcli.metadata.comfyui.workflow import workflow_graph
from sdcli.metadata.tool_record import ToolRecord, mapped_request


def read_comfyui(text: str) -> ToolRecord | None:
    """Read ComfyUI's `prompt`, the graph that its server ran. None for anything else."""
    value = _parsed(text)
    if not isinstance(value, dict):
        return None
    nodes = {
        key: Node(key, node["class_type"], node["inputs"])
        for key, node in value.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    return _read(Graph(nodes)) if nodes else None


def read_comfyui_workflow(text: str) -> ToolRecord | None:
    """Read ComfyUI's `workflow`, the graph as it is drawn, for images without a `prompt`. None for anything else."""
    value = _parsed(text)
    nodes = workflow_graph(value) if isinstance(value, dict) else {}
    return _read(Graph(nodes)) if nodes else None


def _parsed(text: str) -> Any:
    """JSON as Python writes it, with NaN and Infinity; None for anything else."""
    try:
        return parse_json(text, strict=True, finite=False)
    except ValueError:
        return None


def _read(graph: Graph) -> ToolRecord:
    values = Values(graph)
    outputs = graph.outputs()
    probe = Reading(graph, values)
    ways = [chain for output in outputs for chain in chains(graph, output, lambda node: is_full(probe, node))]
    ways = [chain for place, chain in enumerate(ways) if chain not in ways[:place]]
    upstream = graph.upstream(outputs)
    if not ways:
        reading = Reading(graph, values)
        kinds = sorted({node.kind for node in graph.nodes.values()})
        return ToolRecord("comfyui", None, {"nodes": kinds, **reading.rest(upstream)})
    readings = [_read_chain(graph, values, chain) for chain in ways[:MAX_WAYS]]
    found, unmapped = _agreed(readings)
    ends = list(dict.fromkeys(chain[0].id for chain in ways))
    plain = [node for node in outputs if graph.image_sources(node) and not graph.samplers(node)]
    if plain:
        unmapped["sampler"] = f"not certain: node {plain[0].id} ({plain[0].kind}) saves an image that no sampler made"
    if len(ends) > 1:
        unmapped["sampler"] = f"not known: it may be any of the nodes {', '.join(ends)}; what differs is left out"
    used = {chain[-1].id for chain in ways}
    others = [node.id for node in upstream if node.id not in used and is_sampler(graph, node)]
    if others:
        unmapped["other_samplers"] = others
    last = Reading(graph, values)
    last.unmapped = unmapped
    for reading in readings:
        last.include(reading)
    unmapped |= last.rest(upstream)
    _without_effect(found, unmapped)
    request = mapped_request(found, unmapped)
    return ToolRecord("comfyui", request, {name: shown(value) for name, value in unmapped.items()})


MAX_WAYS = 8
"""Samplers that the saved image may come from; of more, the rest is only named."""


def _read_chain(graph: Graph, values: Values, chain: list[Node]) -> Reading:
    """Read the settings of a chain of samplers; the last one of them began the image."""
    reading = Reading(graph, values)
    first = sampler_of(graph, chain[-1])
    flow = any(node.kind in FLOW_NODES for node in graph.upstream([first.node]))
    prompts = {role: read_prompt(reading, guided_by(first, role), role) for role in _FIELDS}
    unguided = first.settings is not None and first.settings.kind == "BasicGuider"
    for role, field in _FIELDS.items():
        if not (unguided and role == "negative"):
            take_prompt(reading, prompts[role], role, field)
    read_size(reading, first)
    for prompt in prompts.values():
        settle_encoders(reading, prompt)
    clips = [clip for prompt in prompts.values() for clip in prompt.clips]
    model = graph.source(first.settings, "model") if first.settings is not None else None
    read_models(reading, model, clips)
    read_sampling(reading, first, flow=flow)
    if len(chain) == 2:
        read_second_pass(reading, sampler_of(graph, chain[0]), first)
    _say_syntax(reading)
    return reading


_FIELDS = {"positive": "prompt", "negative": "negative_prompt"}


def _say_syntax(reading: Reading) -> None:
    """Name what prompts have in them that means something else here."""
    if reading.escaped:
        signs = ", ".join(dict.fromkeys(reading.escaped))
        reading.unmapped["prompt_syntax"] = f"plain text in ComfyUI, so escaped in the prompts: {signs}"
    if reading.embeddings:
        words = ", ".join(dict.fromkeys(reading.embeddings))
        reading.unmapped["embeddings"] = f"{words} (--embedding FILE=WORD uses the file of one)"


def _without_effect(found: dict[str, Any], unmapped: dict[str, Any]) -> None:
    """Name what has no effect beside the rest, as in ComfyUI, or what sdcli refuses beside the rest."""
    composed = _AND.search(str(found.get("prompt", "")))
    scale, steps, upscale = (found.get(name) for name in ("guidance_scale", "steps", "upscale"))
    refused = []
    if _is_number(scale) and scale <= 1:
        refused += ["guidance_rescale", *(["negative_prompt"] if found.get("negative_prompt") else [])]
        refused += ["prompt"] if composed else []
    if composed:
        refused.append("pag_scale")
    if upscale is not None and _is_number(steps) and int(steps * upscale["strength"]) < 1:
        refused.append("upscale")
    for name in refused:
        if found.get(name) is not None:
            unmapped[name] = found.pop(name)


_AND = re.compile(r"\bAND\b")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _agreed(readings: list[Reading]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all readings found; where they differ, the image may be any of them, and all values are named."""
    found: dict[str, Any] = {}
    unmapped: dict[str, Any] = {}
    for name in dict.fromkeys(name for reading in readings for name in reading.unmapped):
        options = _different([reading.unmapped[name] for reading in readings if name in reading.unmapped])
        unmapped[name] = options if len(options) > 1 else options[0]
    for field in dict.fromkeys(name for reading in readings for name in reading.found):
        values = [reading.found.get(field) for reading in readings]
        given = [value for value in values if value is not None]
        if len(given) == len(values) and all(value == given[0] for value in given):
            found[field] = given[0]
        elif given:
            options = _different(given)
            unmapped[field] = options if len(options) > 1 else options[0]
    return found, unmapped


def _different(values: list[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
