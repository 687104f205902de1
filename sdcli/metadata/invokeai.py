"""The records that InvokeAI writes into images, of version 3 and later and of the versions before."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from sdcli.metadata.invokeai_prompt import converted
from sdcli.metadata.tool_record import ToolRecord, json_object, loras_of, mapped_request, name_syntax, taken


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
        image = {**image, **_halves(prompt)}
    outer = {key: value for key, value in record.items() if key != "image"}
    return _invokeai({**outer, **image}, prompt="prompt", sampler="sampler")


def read_dream(text: str) -> ToolRecord | None:
    """Read `Dream`, the command line of version 1 and 2: `"a cat [ugly]" -s 50 -S 42 -W 512 -H 512 -C 7.5 -A k_lms`."""
    text = text.strip()
    end = _closing_quote(text)
    if end is None:
        return None
    try:
        words = shlex.split(text[end + 1 :])
    except ValueError:
        return None
    record: dict[str, Any] = {"prompt": text[1:end].replace('\\"', '"')}
    place = 0
    while place < len(words):
        option, attached = words[place], ""
        place += 1
        if re.match(r"-[sSWHCAfvn].", option):
            option, attached = option[:2], option[2:]
        if not option.startswith("-"):
            return None
        if not attached and place < len(words) and (not words[place].startswith("-") or _is_number(words[place])):
            attached = words[place]
            place += 1
        record[_DREAM.get(option, option)] = attached or "given"
    if not record.keys() & {"seed", "steps"}:
        return None
    return _invokeai({**record, **_halves(record["prompt"])}, prompt="prompt", sampler="sampler")


_DREAM = {
    "-s": "steps", "--steps": "steps", "-S": "seed", "--seed": "seed", "-W": "width", "--width": "width",
    "-H": "height", "--height": "height", "-C": "cfg_scale", "--cfg_scale": "cfg_scale", "-A": "sampler",
    "--sampler": "sampler",
}  # fmt: skip


def _closing_quote(text: str) -> int | None:
    """The place of the quote that ends the prompt: the last one before the options."""
    if not text.startswith('"'):
        return None
    found = [match.start() for match in re.finditer(r'"(?=\s+-|\s*$)', text) if match.start()]
    return found[0] if found else None


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d*)?", word) is not None


def _halves(prompt: str) -> dict[str, Any]:
    """The prompt and the [bracketed] negative one of version 1 and 2."""
    negative = " ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
    return {"prompt": re.sub(r"\[[^\[\]]*\]", "", prompt).strip(), "negative_prompt": negative}


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
    """A record of any version; most of its fields have our names."""
    unmapped = {key: value for key, value in record.items() if value is not None}
    fields = {prompt: "prompt", "negative_prompt": "negative_prompt", "cfg_scale": "guidance_scale"}
    fields |= {name: name for name in ("seed", "steps", "width", "height")}
    found = taken(unmapped, fields)
    loras = loras_of(_named_loras(unmapped.get("loras")))
    if loras:
        found["loras"] = loras
        del unmapped["loras"]
    kept: list[str] = []
    for field in ("prompt", "negative_prompt"):
        if isinstance(found.get(field), str):
            part = converted(found[field])
            found[field] = part.text
            kept += part.kept
            if part.loras and field == "prompt":
                found["loras"] = [*found.get("loras", []), *part.loras]
            elif part.loras:
                unmapped["withLora in the negative prompt"] = [one["path"] for one in part.loras]
    name_syntax(unmapped, kept)
    skipped = unmapped.get("clip_skip")
    if isinstance(skipped, int) and not isinstance(skipped, bool) and skipped >= 0:
        del unmapped["clip_skip"]
        if skipped:  # InvokeAI counts the layers that are left out
            found["clip_skip"] = skipped + 1
    scheduler = _SCHEDULERS.get(str(unmapped.get(sampler)))
    if scheduler is not None:
        found["scheduler"] = scheduler
        del unmapped[sampler]
    return ToolRecord("invokeai", mapped_request(found, unmapped), unmapped)


def _named_loras(listed: Any) -> Iterator[tuple[Any, Any]]:
    """The names and weights of `loras`, of version 3 (`lora.model_name`) and of those after it (`model.name`)."""
    for entry in listed if isinstance(listed, list) else []:
        entry = entry if isinstance(entry, dict) else {}
        model = entry.get("model", entry.get("lora"))
        model = model if isinstance(model, dict) else {}
        yield model.get("name", model.get("model_name")), entry.get("weight")
