"""Other tools' records of how an image was made: A1111's, written and read; ComfyUI's and InvokeAI's, read as data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from sdcli.errors import UsageError
from sdcli.request.fields import LoraRef
from sdcli.request.lora_tags import tag, take_tags
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest, parse_request

Tool = Literal["a1111", "comfyui", "invokeai"]

MAX_JSON_DEPTH = 64
"""How deep a record may nest; no tool comes near, and deeper ones are made to break programs that walk them."""


@dataclass(frozen=True)
class Foreign:
    """What another tool's record says: `request` as far as it maps, and what it does not map to, JSON-ready.

    The request's prompt is the text that the tool's model saw, so its template is always the bare `{prompt}`. Another
    tool's model is never the request's model: its name says nothing about what is installed here.
    """

    tool: Tool
    request: GenerationRequest | None
    unmapped: dict[str, Any]


def read_foreign(texts: Mapping[str, str]) -> Foreign | None:
    """The first record that is understood among an image's texts (by their key); None where there is none.

    Never raises, whatever the texts hold.
    """
    for key, read in READERS.items():
        if key in texts and (foreign := read(texts[key])) is not None:
            return foreign
    return None


def load_json(text: str) -> Any:
    """JSON as plain data: finite numbers, nesting of at most MAX_JSON_DEPTH. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError("is nested too deeply")
        level = [child for parent in level for child in _children(parent)]
    return value


# A1111


def a1111_text(
    request: GenerationRequest,
    *,
    version: str,
    model_hash: str | None = None,
    lora_hashes: Mapping[str, str] | None = None,
) -> str:
    """The `parameters` text of a request as generated, as the webui writes it; LoRAs are tags behind the prompt.

    `model_hash` is the first 10 hex digits of the weights' SHA-256, `lora_hashes` holds the first 12 of each LoRA's
    tensors, by its name. Numbers are written as the webui's sliders give
    them (7, not 7.0). `Schedule type` is Automatic where the webui would choose the same by itself.
    """
    row = SCHEDULERS[request.scheduler] if request.scheduler is not None else None
    pairs = {
        "Steps": request.steps,
        "Sampler": row and row.a1111,
        "Schedule type": row and (row.a1111_type or ("Uniform" if row.a1111 in _A1111_AUTOMATIC else "Automatic")),
        "CFG scale": _shortest(request.guidance_scale),
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Clip skip": request.clip_skip if request.clip_skip != 1 else None,
        "Model hash": model_hash,
        "Model": request.model and _a1111_model(request.model),
        "Variation seed": request.variation_seed,
        "Variation seed strength": _shortest(request.variation_strength),
        "Denoising strength": _shortest(request.upscale.strength if request.upscale else request.strength),
        "Mask blur": _shortest(request.mask_blur),
        "Hires upscale": _shortest(request.upscale.factor if request.upscale else None),
        "Eta": _shortest(request.eta) if row and row.uses_eta and request.eta else None,
        "Refiner": request.refiner and _a1111_model(request.refiner),
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
    """`parameters` text -> prompt, negative prompt, and the last line's pairs, by the webui's rules.

    The last line holds parameters only if at least 3 pairs match. The text is ambiguous, and these are lost in it as
    they are in the webui: white space around each line, blank lines at the start of a prompt, and a line of a prompt
    that itself begins with `Negative prompt:` (all after it is taken as negative). sdcli's own record is always exact.
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


def read_a1111(text: str) -> Foreign | None:
    """A1111's `parameters` text (also Forge's, SD.Next's, Civitai's ...). None for a JSON object, another tool's."""
    if text.lstrip().startswith("{") and _json_object(text) is not None:
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
    for key, field in _A1111_NUMBERS.items():
        if key in unmapped:
            found[field] = unmapped.pop(key)
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", pairs.get("Size", "")):
        del unmapped["Size"]
        found |= {"width": match[1], "height": match[2]}
    scheduler = _a1111_scheduler(pairs.get("Sampler", ""), pairs.get("Schedule type"))
    if scheduler is not None:
        found["scheduler"] = scheduler
        unmapped = {key: value for key, value in unmapped.items() if key not in ("Sampler", "Schedule type")}
        if "Eta" in unmapped and SCHEDULERS[scheduler].uses_eta:
            found["eta"] = unmapped.pop("Eta")
    return Foreign("a1111", _mapped(found, unmapped), unmapped)


_A1111_NUMBERS = {
    "Steps": "steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
}
_A1111_AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
"""What `Schedule type: Automatic` means for the samplers where it is not evenly spaced steps."""

_A1111_SCHEDULERS = {(row.a1111.lower(), row.a1111_type): name for name, row in SCHEDULERS.items()}


def _a1111_scheduler(sampler: str, schedule_type: str | None) -> str | None:
    """Our name for A1111's pair; older texts have the type in the sampler's name (`DPM++ 2M Karras`), or none."""
    if schedule_type is None:
        for suffix in ("Karras", "Exponential"):
            if sampler.endswith(f" {suffix}"):
                sampler, schedule_type = sampler.removesuffix(f" {suffix}"), suffix
    elif schedule_type == "Automatic":
        schedule_type = _A1111_AUTOMATIC.get(sampler)
    elif schedule_type in ("Uniform", "Normal"):
        schedule_type = None
    return _A1111_SCHEDULERS.get((sampler.lower(), schedule_type))


_RUN = re.compile(r"([\w \-/]+)(:?)")
_VALUE = re.compile(r"""\s*(?:(?P<quoted>"(?:[^\\"]|\\.)+")|(?P<bare>[^,]*))(?:,|$)""")


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The `Key: value` pairs of a line: a key is a word character, then words, spaces, `-` and `/`.

    Walks run by run, in linear time: one expression for the whole pair (the webui's) takes quadratic time on a long
    line without a colon, which is minutes for a hostile image.
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


def _a1111_model(model: str) -> str:
    """The webui knows models by their file's name without suffix, and strips the marks of its own text."""
    name = PurePath(model).name if PurePath(model).is_absolute() else model
    return name.removesuffix(".safetensors").replace(",", "").replace(":", "")


# ComfyUI


def read_comfyui(text: str) -> Foreign | None:
    """ComfyUI's `prompt`, a graph of nodes: its KSampler, and what that links to. None for anything else."""
    graph = _json_object(text)
    nodes = {
        key: node
        for key, node in (graph or {}).items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    if not nodes:
        return None
    samplers = [key for key, node in nodes.items() if node["class_type"] in ("KSampler", "KSamplerAdvanced")]
    if not samplers:
        return Foreign("comfyui", None, {"nodes": sorted({node["class_type"] for node in nodes.values()})})
    # Of several samplers the one that starts from an empty latent made the image; the others refine it.
    chosen = next((key for key in samplers if "width" in _linked(nodes, key, "latent_image")), samplers[0])
    unmapped: dict[str, Any] = {}
    if len(samplers) > 1:
        unmapped["other_samplers"] = [key for key in samplers if key != chosen]
    found = {
        "steps": _scalar(nodes, chosen, "steps"),
        "guidance_scale": _scalar(nodes, chosen, "cfg"),
        "seed": _scalar(nodes, chosen, "noise_seed" if "noise_seed" in nodes[chosen]["inputs"] else "seed"),
    }
    for role, field in {"positive": "prompt", "negative": "negative_prompt"}.items():
        texts = _comfyui_texts(nodes, chosen, role)
        if len(texts) == 1:
            found[field] = texts[0]
        else:
            unmapped[role] = texts
    latent = _linked(nodes, chosen, "latent_image")
    found |= {side: latent[side] for side in ("width", "height") if side in latent}
    sampler = {name: _scalar(nodes, chosen, name) for name in ("sampler_name", "scheduler")}
    scheduler = _COMFYUI_SCHEDULERS.get((str(sampler["sampler_name"]), str(sampler["scheduler"])))
    if scheduler is not None:
        found["scheduler"] = scheduler
    else:
        unmapped |= sampler
    ordinary = {"denoise": 1, "start_at_step": 0, "batch_size": 1}
    given = {**nodes[chosen]["inputs"], "batch_size": latent.get("batch_size", 1)}
    unmapped |= {name: given[name] for name, usual in ordinary.items() if name in given and given[name] != usual}
    unmapped |= _comfyui_model(nodes, chosen)
    present = {field: value for field, value in found.items() if value is not None}
    return Foreign("comfyui", _mapped(present, unmapped), unmapped)


_COMFYUI_SCHEDULERS = {
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


def _linked(nodes: Nodes, key: str, name: str) -> dict[str, Any]:
    """The inputs of the node that an input is linked to."""
    target = _link(nodes, nodes[key]["inputs"].get(name))
    return nodes[target]["inputs"] if target is not None else {}


def _scalar(nodes: Nodes, key: str, name: str) -> Any:
    """An input's value, also where it comes from a node that holds just a value. None where it cannot be told."""
    value = nodes[key]["inputs"].get(name)
    for _ in range(16):  # links may go in circles
        target = _link(nodes, value)
        if target is None:
            return None if isinstance(value, (list, dict)) else value
        inputs = nodes[target]["inputs"]
        value = next((inputs[other] for other in (name, "value", "seed", "text", "string") if other in inputs), None)
    return None


def _comfyui_texts(nodes: Nodes, key: str, role: str) -> list[str]:
    """The texts that a sampler's `positive` or `negative` input is made of, through whatever stands between."""
    texts, seen, waiting = [], set(), [_link(nodes, nodes[key]["inputs"].get(role))]
    while waiting:
        node = waiting.pop(0)
        # A zeroed condition has lost its text.
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


def _comfyui_model(nodes: Nodes, key: str) -> dict[str, Any]:
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


# InvokeAI


def read_invokeai(text: str) -> Foreign | None:
    """InvokeAI's `invokeai_metadata` (version 3 and later). None for anything else."""
    record = _json_object(text)
    if record is None or not record.keys() & {"positive_prompt", "seed", "generation_mode"}:
        return None
    return _invokeai(record, prompt="positive_prompt", sampler="scheduler")


def read_old_invokeai(text: str) -> Foreign | None:
    """InvokeAI's `sd-metadata` (version 2). There, what stands in [brackets] in the prompt is the negative prompt."""
    record = _json_object(text)
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


_INVOKEAI_SCHEDULERS = {
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


def _invokeai(record: dict[str, Any], *, prompt: str, sampler: str) -> Foreign:
    """Both layouts name most fields as we do, or as `request.ALIASES` knows them."""
    unmapped = {key: value for key, value in record.items() if value is not None}
    fields = {prompt: "prompt", "negative_prompt": "negative_prompt", "cfg_scale": "guidance_scale"}
    fields |= {name: name for name in ("seed", "steps", "width", "height")}
    found = {field: unmapped.pop(key) for key, field in fields.items() if key in unmapped}
    scheduler = _INVOKEAI_SCHEDULERS.get(str(unmapped.get(sampler)))
    if scheduler is not None:
        found["scheduler"] = scheduler
        del unmapped[sampler]
    return Foreign("invokeai", _mapped(found, unmapped), unmapped)


READERS: dict[str, Callable[[str], Foreign | None]] = {
    "parameters": read_a1111,
    "invokeai_metadata": read_invokeai,
    "sd-metadata": read_old_invokeai,
    "prompt": read_comfyui,
}
"""The key of an image's text -> its reader, in the order of trust where an image has several."""


def _mapped(found: dict[str, Any], unmapped: dict[str, Any]) -> GenerationRequest | None:
    """A request of the fields that are valid here; the others join `unmapped`, which this alone may add to."""
    valid = {}
    for field, value in found.items():
        try:
            if isinstance(value, bool):
                raise UsageError(f"{field}: should be no boolean")
            side = getattr(parse_request({field: value}), field)
            if field in ("width", "height") and side % 8:  # all these tools generate on the latents of a VAE
                raise UsageError(f"{field}: should be a multiple of 8, not {side}")
            valid[field] = value
        except UsageError:
            unmapped[field] = value
    return parse_request({**valid, "prompt_template": "{prompt}"}) if valid else None


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = load_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is no finite number")
    return number
