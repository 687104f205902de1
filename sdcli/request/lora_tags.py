"""LoRA tags in a prompt, as the web UI writes them: `<lora:NAME:WEIGHT>` <-> entries of a request. Text only."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from sdcli.errors import UsageError
from sdcli.request.fields import LoraRef, digits
from sdcli.request.schema import first_problem

_TAG = re.compile(r" ?<lora:([^<>]*)>")


def take_tags(prompt: str) -> tuple[str, tuple[LoraRef, ...]]:
    """A prompt without its tags, and what they ask for.

    A tag is the web UI's: `<lora:NAME>`, `<lora:NAME:WEIGHT>` or `<lora:NAME:TEXT_WEIGHT:UNET_WEIGHT>` (in this order,
    the other way round than in `--lora`), where `te=WEIGHT` and `unet=WEIGHT` may stand as well. Raises UsageError.
    """
    refs = tuple(_ref_of_tag(match[1]) for match in _TAG.finditer(prompt))
    return (_TAG.sub("", prompt).strip() if refs else prompt), refs


def tag(ref: LoraRef) -> str:
    """The web UI's tag for a LoRA, by the name of its file: `<lora:NAME:WEIGHT>`."""
    both = f":{digits(ref.unet_weight)}" if ref.unet_weight != ref.text_weight else ""
    return f"<lora:{lora_name(ref)}:{digits(ref.text_weight)}{both}>"


def lora_name(ref: LoraRef) -> str:
    """What a LoRA is called in the web UI's texts: its file's name, without what has a meaning there."""
    return re.sub(r"[<>:,=\n]", "", Path(ref.path).name.removesuffix(".safetensors"))


def _ref_of_tag(inner: str) -> LoraRef:
    """`NAME:0.8` -> the entry, by the web UI's rules."""
    named = dict(part.split("=", 1) for part in inner.split(":") if "=" in part)
    name, *weights = [part for part in inner.split(":") if "=" not in part] or [""]
    if len(weights) > 2 or set(named) - {"te", "unet"}:
        raise UsageError(f"<lora:{inner}> is not understood; a tag is <lora:NAME:WEIGHT>")
    text = named.get("te", weights[0] if weights else "1")
    unet = named.get("unet", weights[1] if len(weights) > 1 else text)
    try:
        return LoraRef.model_validate({"path": name.strip(), "unet_weight": unet, "text_weight": text})
    except ValidationError as error:
        raise UsageError(f"<lora:{inner}>: {first_problem(error)}") from None
