"""The `prompt` graph that ComfyUI writes into images, read as data: nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcli.metadata.tool_record import ToolRecord, json_object, mapped_request


def read_comfyui(text: str) -> ToolRecord | None:
    """Read ComfyUI's `prompt`, a graph of nodes, from its KSampler along its links. None for anything else."""
    graph = json_object(text)
    nodes = {
        key: node
        for key, node in (graph or {}).items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    if not nodes:
        return None
    samplers = [key for key, node in nodes.items() if node["class_type"] in ("KSampler", "KSamplerAdvanced")]
    if not samplers:
        return ToolRecord("comfyui", None, {"nodes": sorted({node["class_type"] for node in nodes.values()})})
    # Of several samplers the one that starts from an empty latent made the image; the others refine it.
    chosen = next((key for key in samplers if "width" in _linked_inputs(nodes, key, "latent_image")), samplers[0])
    unmapped: dict[str, Any] = {}
    if len(samplers) > 1:
        unmapped["other_samplers"] = [key for key in samplers if key != chosen]
    found = {
        "steps": _scalar(nodes, chosen, "steps"),
        "guidance_scale": _scalar(nodes, chosen, "cfg"),
        "seed": _scalar(nodes, chosen, "noise_seed" if "noise_seed" in nodes[chosen]["inputs"] else "seed"),
    }
    for role, field in {"positive": "prompt", "negative": "negative_prompt"}.items():
        texts = _texts(nodes, chosen, role)
        if len(texts) == 1:
            found[field] = texts[0]
        else:
            unmapped[role] = texts
    latent = _linked_inputs(nodes, chosen, "latent_image")
    found |= {side: latent[side] for side in ("width", "height") if side in latent}
    sampler = {name: _scalar(nodes, chosen, name) for name in ("sampler_name", "scheduler")}
    scheduler = _SCHEDULERS.get((str(sampler["sampler_name"]), str(sampler["scheduler"])))
    if scheduler is not None:
        found["scheduler"] = scheduler
    else:
        unmapped |= sampler
    ordinary = {"denoise": 1, "start_at_step": 0, "batch_size": 1}
    given = {**nodes[chosen]["inputs"], "batch_size": latent.get("batch_size", 1)}
    unmapped |= {name: given[name] for name, usual in ordinary.items() if name in given and given[name] != usual}
    unmapped |= _model(nodes, chosen)
    present = {field: value for field, value in found.items() if value is not None}
    return ToolRecord("comfyui", mapped_request(present, unmapped), unmapped)


_SCHEDULERS = {
    ("ddpm", "normal"): "ddpm",
    ("ddim", "normal"): "ddim",
    ("ddim", "ddim_uniform"): "ddim",
    ("euler", "normal"): "euler",
    ("euler_ancestral", "normal"): "euler-a",
    ("heun", "normal"): "heun",
    ("dpmpp_2m", "normal"): "dpmpp-2m",
    ("dpmpp_2m", "karras"): "dpmpp-2m-karras",
    ("dpmpp_2m_sde", "normal"): "dpmpp-2m-sde",
    ("dpmpp_2m_sde_gpu", "normal"): "dpmpp-2m-sde",
    ("uni_pc", "normal"): "unipc",
    ("lms", "normal"): "lms",
    ("lcm", "normal"): "lcm",
    ("lcm", "sgm_uniform"): "lcm",
}

Nodes = Mapping[str, dict[str, Any]]


def _link(nodes: Nodes, value: Any) -> str | None:
    """The id of the node that an input is linked to (`["4", 0]`), or None for a plain value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and str(value[0]) in nodes:
        return str(value[0])
    return None


def _linked_inputs(nodes: Nodes, key: str, name: str) -> dict[str, Any]:
    """The inputs of the node that an input is linked to; empty for a plain value."""
    target = _link(nodes, nodes[key]["inputs"].get(name))
    return nodes[target]["inputs"] if target is not None else {}


def _scalar(nodes: Nodes, key: str, name: str) -> Any:
    """An input's value, also if it comes from a node that only holds a value; None if it cannot be determined."""
    value = nodes[key]["inputs"].get(name)
    for _ in range(16):  # links may form a cycle
        target = _link(nodes, value)
        if target is None:
            return None if isinstance(value, (list, dict)) else value
        inputs = nodes[target]["inputs"]
        value = next((inputs[other] for other in (name, "value", "seed", "text", "string") if other in inputs), None)
    return None


def _texts(nodes: Nodes, key: str, role: str) -> list[str]:
    """The texts behind a sampler's `positive` or `negative` input, through any nodes in between."""
    texts, seen, waiting = [], set(), [_link(nodes, nodes[key]["inputs"].get(role))]
    while waiting:
        node = waiting.pop(0)
        # A zeroed conditioning has lost its text.
        if node is None or node in seen or nodes[node]["class_type"] == "ConditioningZeroOut":
            continue
        seen.add(node)
        inputs = nodes[node]["inputs"]
        holder = next((name for name in ("text", "text_g") if name in inputs), None)
        if holder is not None:
            text = _scalar(nodes, node, holder)
            texts += [text] if isinstance(text, str) else []
        elif role in inputs:
            waiting.append(_link(nodes, inputs[role]))
        else:
            waiting += [_link(nodes, value) for name, value in inputs.items() if name.startswith("conditioning")]
    return texts


def _model(nodes: Nodes, key: str) -> dict[str, Any]:
    """The names of the checkpoint and the LoRAs behind a sampler's `model` input, as far as they are known."""
    model, loras, seen = _link(nodes, nodes[key]["inputs"].get("model")), [], set()
    while model is not None and model not in seen:
        seen.add(model)
        inputs = nodes[model]["inputs"]
        if "lora_name" in inputs:
            loras.append(inputs["lora_name"])
        name = inputs.get("ckpt_name", inputs.get("unet_name"))
        if name is not None:
            return {"model": name, **({"loras": loras} if loras else {})}
        model = _link(nodes, inputs.get("model"))
    return {"loras": loras} if loras else {}
