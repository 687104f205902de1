"""ComfyUI's `workflow`, the graph as the user interface draws it, turned into the nodes that its server would run.

The values of a node's widgets are stored without their names. Those of ComfyUI's own nodes are known here; those of
other nodes are named only where the file says how. Muted nodes are dropped, bypassed ones pass their links on,
subgraphs are replaced by their nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sdcli.metadata.comfyui.conditioning import ENCODERS
from sdcli.metadata.comfyui.graph import Node

MAX_NODES = 10_000
"""Of all subgraphs together; the rest is not read."""
MAX_LEVELS = 8
"""Subgraphs within subgraphs."""
_MUTED, _BYPASSED = 2, 4
_INPUTS, _OUTPUTS = -10, -20
"""Ids of a subgraph's own inputs and outputs."""


def workflow_graph(value: dict[str, Any]) -> dict[str, Node]:
    """The nodes of a workflow by their ids; empty for JSON of another kind. Never raises."""
    if not isinstance(value.get("nodes"), list):
        return {}
    definitions = value.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    kinds = {
        one["id"]: one
        for one in (subgraphs if isinstance(subgraphs, list) else [])
        if isinstance(one, dict) and isinstance(one.get("id"), str)
    }
    found: dict[str, Node] = {}
    for level in _levels(_Level(value, "", None, None), kinds):
        for id, node in level.nodes.items():
            if node.get("mode") in (_MUTED, _BYPASSED) or node["type"] in kinds or len(found) >= MAX_NODES:
                continue
            key = f"{level.prefix}{id}"
            found[key] = Node(key, node["type"], _inputs(level, node, kinds))
    return found


class _Level:
    """A workflow, or a subgraph in the place of one of its nodes."""

    def __init__(self, value: dict[str, Any], prefix: str, parent: _Level | None, instance: dict[str, Any] | None):
        self.prefix = prefix
        self.parent = parent
        self.instance = instance
        self.inputs = _dicts(value.get("inputs"))
        self.nodes = {
            str(node["id"]): node
            for node in _dicts(value.get("nodes"))
            if isinstance(node.get("id"), int | str) and isinstance(node.get("type"), str)
        }
        links = value.get("links")
        self.links = dict(_link(link) for link in (links if isinstance(links, list) else []) if _link(link))  # type: ignore[misc]
        self.inner: dict[str, _Level] = {}
        """The subgraphs of this level by the ids of their nodes."""


def _levels(level: _Level, kinds: dict[str, Any], depth: int = 0, left: list[int] | None = None) -> Iterator[_Level]:
    left = left if left is not None else [MAX_NODES]
    left[0] -= 1 + len(level.nodes)
    for id, node in level.nodes.items():
        if node["type"] in kinds and depth < MAX_LEVELS and left[0] > 0:
            level.inner[id] = _Level(kinds[node["type"]], f"{level.prefix}{id}:", level, node)
            if node.get("mode") not in (_MUTED, _BYPASSED):
                yield from _levels(level.inner[id], kinds, depth + 1, left)
    yield level


def _link(link: Any) -> tuple[Any, tuple[str, int, str, int]] | None:
    """`[id, from, slot, to, slot, type]`, or an object with the same -> id, and the rest without the type."""
    if isinstance(link, dict):
        link = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    if not isinstance(link, list) or len(link) < 5 or not all(isinstance(one, int | str) for one in link[:5]):
        return None
    id, origin, slot, target, place = link[:5]
    if not isinstance(slot, int) or not isinstance(place, int):
        return None
    return id, (str(origin), slot, str(target), place)


def _inputs(level: _Level, node: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node: the values of its widgets, and over them its links."""
    inputs = _widgets(node)
    for one in _dicts(node.get("inputs")):
        name, link = one.get("name"), one.get("link")
        if not isinstance(name, str) or link is None:
            continue
        output = _output(level, link, one.get("type"), 0)
        if output is not None:
            inputs[name] = output
        else:
            inputs.pop(name, None)
    return inputs


def _output(level: _Level, link: Any, kind: Any, depth: int) -> Any:
    """What a link leads to, as the server's `[id, slot]`; None where that is nothing."""
    if depth > 100 or not isinstance(link, int | str) or link not in level.links:
        return None
    origin, slot, _, _ = level.links[link]
    if origin == str(_INPUTS):
        return _outer(level, slot, depth)
    node = level.nodes.get(origin)
    if node is None or node.get("mode") == _MUTED:
        return None
    if node.get("mode") == _BYPASSED:
        passed = _passed(node, slot, kind)
        return None if passed is None else _output(level, passed, kind, depth + 1)
    if node["type"] == "GetNode":
        named = _setter(level, _first(node))
        return None if named is None else _output(level, named, kind, depth + 1)
    inner = level.inner.get(origin)
    if inner is not None:
        ends = (id for id, (_, _, target, place) in inner.links.items() if (target, place) == (str(_OUTPUTS), slot))
        end = next(ends, None)
        return None if end is None else _output(inner, end, kind, depth + 1)
    return [f"{level.prefix}{origin}", slot]


def _outer(level: _Level, slot: int, depth: int) -> Any:
    """What is linked to a subgraph's input from outside; a value that the subgraph's node holds itself is unknown."""
    if level.parent is None or level.instance is None or not 0 <= slot < len(level.inputs):
        return None
    name = level.inputs[slot].get("name")
    for one in _dicts(level.instance.get("inputs")):
        if one.get("name") == name and one.get("link") is not None:
            return _output(level.parent, one["link"], one.get("type"), depth + 1)
    return {"input of a subgraph": name}


def _passed(node: dict[str, Any], slot: int, kind: Any) -> Any:
    """The link that a bypassed node passes on to an output: of the same place if the type fits, else the first one."""
    outputs, inputs = _dicts(node.get("outputs")), _dicts(node.get("inputs"))
    kind = outputs[slot].get("type") if 0 <= slot < len(outputs) else kind
    ordered = [*inputs[slot : slot + 1], *inputs] if slot >= 0 else inputs
    return next((one.get("link") for one in ordered if one.get("type") == kind), None)


def _setter(level: _Level, name: Any) -> Any:
    """The link to the SetNode of that name."""
    for node in level.nodes.values():
        if node["type"] == "SetNode" and _first(node) == name and name is not None:
            return next((one.get("link") for one in _dicts(node.get("inputs"))), None)
    return None


def _widgets(node: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by their names, or all together where the names are not certain."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return {str(name): value for name, value in values.items() if name != "videopreview"}
    if not isinstance(values, list) or not values:
        return {}
    kind = node["type"]
    if kind == "PrimitiveNode":
        held = values[0]
        plain = not (isinstance(held, str) and re.search(r"\{|//|/\*", held))
        return {"value": held if plain else {"random choices": held}}
    names = _named(node, values)
    if names is None:
        return {"widgets_values": {"names not stored": values}}
    found = {name: value for name, value in zip(names, values, strict=False) if name != "control_after_generate"}
    for name in ENCODERS.get(kind, ()):
        if isinstance(found.get(name), str):
            found[name] = _static(found[name])
    return found


def _named(node: dict[str, Any], values: list[Any]) -> list[str] | None:
    """The names of the widgets in the order of their values; None where they are not certain."""
    known = WIDGETS.get(node["type"])
    if known is not None:
        names = known.split()
        if len(values) < len(names) and "control_after_generate" in names:
            names.remove("control_after_generate")  # versions before it, and files of scripts
        return names if len(values) >= len(names) else None
    given = [one["widget"].get("name") for one in _dicts(node.get("inputs")) if isinstance(one.get("widget"), dict)]
    names = []
    for name in given:
        names += [str(name), *(["control_after_generate"] if name in ("seed", "noise_seed") else [])]
    if len(names) == len(values) and len(names) > len(given):
        return names
    return [str(name) for name in given] if len(given) == len(values) else None


def _static(text: str) -> Any:
    """A text as the user interface sends it: without comments; one with {choices} was drawn at random."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    return {"random choices": text} if re.search(r"(?<!\\)[{}]", text) else re.sub(r"\\([{}])", r"\1", text)


def _first(node: dict[str, Any]) -> Any:
    values = node.get("widgets_values")
    return values[0] if isinstance(values, list) and values else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


_SIZE = "width height batch_size"
WIDGETS = {
    "KSampler": "seed control_after_generate steps cfg sampler_name scheduler denoise",
    "KSamplerAdvanced": "add_noise noise_seed control_after_generate steps cfg sampler_name scheduler start_at_step "
    "end_at_step return_with_leftover_noise",
    "SamplerCustom": "add_noise noise_seed control_after_generate cfg",
    "RandomNoise": "noise_seed control_after_generate",
    "CFGGuider": "cfg",
    "KSamplerSelect": "sampler_name",
    "BasicScheduler": "scheduler steps denoise",
    "KarrasScheduler": "steps sigma_max sigma_min rho",
    "SamplerEulerAncestral": "eta s_noise",
    "CLIPTextEncode": "text",
    "CLIPTextEncodeSDXL": "width height crop_w crop_h target_width target_height text_g text_l",
    "CLIPTextEncodeSDXLRefiner": "ascore width height text",
    "CLIPTextEncodeFlux": "clip_l t5xxl guidance",
    "CLIPTextEncodeSD3": "clip_l clip_g t5xxl empty_padding",
    "FluxGuidance": "guidance",
    "CLIPSetLastLayer": "stop_at_clip_layer",
    "EmptyLatentImage": _SIZE,
    "EmptySD3LatentImage": _SIZE,
    "CheckpointLoaderSimple": "ckpt_name",
    "CheckpointLoader": "config_name ckpt_name",
    "UNETLoader": "unet_name weight_dtype",
    "VAELoader": "vae_name",
    "LoraLoader": "lora_name strength_model strength_clip",
    "LoraLoaderModelOnly": "lora_name strength_model",
    "ControlNetLoader": "control_net_name",
    "ControlNetApply": "strength",
    "ControlNetApplyAdvanced": "strength start_percent end_percent",
    "LoadImage": "image upload",
    "LatentUpscale": "upscale_method width height crop",
    "LatentUpscaleBy": "upscale_method scale_by",
    "ImageScale": "upscale_method width height crop",
    "ImageScaleBy": "upscale_method scale_by",
    "UpscaleModelLoader": "model_name",
    "ModelSamplingDiscrete": "sampling zsnr",
    "ModelSamplingSD3": "shift",
    "PerturbedAttentionGuidance": "scale",
    "RescaleCFG": "multiplier",
    "FreeU": "b1 b2 s1 s2",
    "FreeU_V2": "b1 b2 s1 s2",
    "ConditioningAverage": "conditioning_to_strength",
    "ConditioningSetArea": "width height x y strength",
    "ConditioningSetTimestepRange": "start end",
    "SaveImage": "filename_prefix",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "PrimitiveInt": "value control_after_generate",
    "PrimitiveFloat": "value",
    "PrimitiveBoolean": "value",
    "StringConcatenate": "string_a string_b delimiter",
    "StringReplace": "string find replace",
    "StringTrim": "string mode",
    "CaseConverter": "string mode",
    "StringSubstring": "string start end",
}
"""Nodes of ComfyUI -> the names of their widgets, in the order in which a workflow stores the values."""
