"""The model and text encoder behind a ComfyUI sampler: checkpoint, LoRAs, clip skip, and patches of the guidance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdcli.metadata.comfyui.graph import Graph, Node, Output
from sdcli.metadata.comfyui.reading import Reading
from sdcli.metadata.comfyui.values import Unknown

_LOADERS = ("ckpt_name", "unet_name")
_PATCHES = {
    "PerturbedAttentionGuidance": ("scale", "pag_scale"),
    "RescaleCFG": ("multiplier", "guidance_rescale"),
}
"""Nodes of the model that sdcli has a field for: their input, and the field."""


def read_models(reading: Reading, model: Output | None, clips: Sequence[Output]) -> None:
    """Take over LoRAs, clip skip and patches; name the checkpoint. `clips` are those of all prompts that are read."""
    graph = reading.graph
    models = walk(graph, model, "model")
    encoders = [walk(graph, clip, "clip") for clip in dict.fromkeys(clips)]
    loader = next((node for node in models if _loaded(node) is not None), None)
    if loader is not None:
        name = str(_loaded(loader))
        try:
            reading.unmapped["model"] = reading.value(loader, name)
        except Unknown as error:
            reading.unmapped["model"] = f"not known: it {error}"
        reading.settle(loader, {"weight_dtype": "default", "vae_name": "Baked VAE"})
        if reading.peek(loader, "lora_name") == "None":  # the loader of Efficiency Nodes
            reading.ignore(loader, "lora_name", "lora_model_strength", "lora_clip_strength")
    for node in models:
        if node.kind in _PATCHES:
            _patch(reading, node, models)
    _loras(reading, models, encoders)
    _clip_skip(reading, encoders)


def walk(graph: Graph, output: Output | None, name: str) -> list[Node]:
    """The nodes that an output is made by, one behind the other, along their inputs of that name."""
    found: list[Node] = []
    while output is not None and output.node not in found[-1:] and len(found) < len(graph.nodes):
        found.append(output.node)
        links = graph.links(output.node)
        output = links.get(name) or (next(iter(links.values())) if len(links) == 1 else None)
    return list(dict.fromkeys(found))


def _loaded(node: Node) -> str | None:
    """The input of a node that names the file of a model."""
    return next((name for name in _LOADERS if name in node.inputs), None)


def _patch(reading: Reading, node: Node, models: list[Node]) -> None:
    name, field = _PATCHES[node.kind]
    if sum(other.kind == node.kind for other in models) > 1:
        return  # they add up, or one replaces the other: both are named
    try:
        reading.found[field] = reading.value(node, name)
        reading.understand(node)
    except Unknown as error:
        reading.unmapped[field] = f"not known: it {error}"


@dataclass(frozen=True)
class _Lora:
    """A LoRA of a loader, with the inputs that say so."""

    name: str
    unet_weight: Any
    text_weight: Any
    node: Node
    inputs: tuple[str, ...]


def _loras(reading: Reading, models: list[Node], encoders: list[list[Node]]) -> None:
    loras = []
    for node in dict.fromkeys(node for chain in (models, *encoders) for node in reversed(chain)):
        in_model, in_encoders = node in models, [node in chain for chain in encoders]
        if any(in_encoders) != all(in_encoders) or (in_model and not encoders and node.kind != "LoraLoaderModelOnly"):
            continue  # for one of the prompts alone, or not known for which
        try:
            found = _loras_of(reading, node)
        except Unknown:
            continue
        for lora in found:
            unused = {"strength_model": not in_model, "strength_clip": not any(in_encoders)}
            loras.append(
                {
                    "path": lora.name,
                    "unet_weight": lora.unet_weight if in_model else 0,
                    "text_weight": lora.text_weight if any(in_encoders) else 0,
                }
            )
            reading.ignore(node, *(name for name in lora.inputs if not unused.get(name)))
        if found:
            reading.understand(node)
    if loras:
        reading.found["loras"] = loras
        return
    left = [node for node in models if reading.peek(node, "lora_name", "None") != "None"]
    if left:
        reading.unmapped["loras"] = [reading.peek(node, "lora_name") for node in left]
    for node in left:
        reading.ignore(node, "lora_name")
        reading.understand(node)


def _loras_of(reading: Reading, node: Node) -> list[_Lora]:
    """The LoRAs that a node loads. Raises Unknown where a part of it is not certain."""
    if node.kind in ("LoraLoader", "LoraLoaderModelOnly"):
        inputs = ["lora_name", "strength_model", *(["strength_clip"] if node.kind == "LoraLoader" else [])]
        known = [reading.values.of(node, name) for name in inputs]
        name, *weights = (one.value for one in known)
        if not isinstance(name, str) or not all(_is_number(weight) for weight in weights):
            raise Unknown("is of the wrong type")
        for one in known:
            reading.take(one, but=node)
        return [_Lora(lora_word(name), weights[0], weights[1] if len(weights) > 1 else 0, node, tuple(inputs))]
    if node.kind == "Power Lora Loader (rgthree)":
        return [lora for name, value in node.inputs.items() if (lora := _power_lora(node, name, value)) is not None]
    return []


def _power_lora(node: Node, name: str, value: Any) -> _Lora | None:
    """rgthree's `{"on": true, "lora": "ink.safetensors", "strength": 1}`; another strength for the text if given."""
    if not isinstance(value, dict) or value.get("on") is not True or not isinstance(value.get("lora"), str):
        return None
    strength = value.get("strength")
    text = strength if value.get("strengthTwo") is None else value["strengthTwo"]
    if not _is_number(strength) or not _is_number(text) or value.keys() - {"on", "lora", "strength", "strengthTwo"}:
        return None
    return _Lora(lora_word(value["lora"]), strength, text, node, (name,))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def lora_word(name: str) -> str:
    """The name of a LoRA: its file's, without folder and suffix."""
    return re.split(r"[/\\]", name)[-1].removesuffix(".safetensors") or name


_LAYERS = {"CLIPSetLastLayer": "stop_at_clip_layer", "Efficient Loader": "clip_skip"}


def _clip_skip(reading: Reading, encoders: list[list[Node]]) -> None:
    """The layer at which all prompts stop: the nearest node of each that sets it counts."""
    nearest = [next((node for node in chain if node.kind in _LAYERS), None) for chain in encoders]
    nodes = [node for node in nearest if node is not None]
    if not nodes or len(nodes) < len(nearest):
        return
    layers = {reading.peek(node, _LAYERS[node.kind]) for node in nodes}
    layer = next(iter(layers))
    if len(layers) == 1 and isinstance(layer, int) and not isinstance(layer, bool) and layer < 0:
        reading.found["clip_skip"] = -layer
        for node in nodes:
            reading.take(reading.values.of(node, _LAYERS[node.kind]))
            reading.understand(node)
