"""Tags in a prompt: `<lora:NAME:WEIGHT>` <-> entries of a request; tags of other kinds are refused. Text only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sdcli.errors import UsageError
from sdcli.request.fields import LoraRef, digits
from sdcli.request.schema import did_you_mean, first_problem

_TAG = re.compile(
    r" ?(?<!\\)<(?:(?P<bare>break|trigger)>|"
    r"(?P<name>\s*[A-Za-z]\w*\s*(?:\[[^\]<>]*\]\s*)?):(?!//)(?P<inner>[^<>]*)(?P<end>>?))"
)
_LORA_TAG = re.compile(r" ?<lora:([^<>]*)>")
LORAS = ("lora", "lyco")
"""Tags of LoRAs; the web UI reads the second, an extension's, like the first."""
_INSTEAD = {
    "hypernet": "hypernetworks are not supported",
    "embedding": "--embedding FILE=WORD loads an embedding, and its word stands in the prompt",
    "embed": "--embedding FILE=WORD loads an embedding, and its word stands in the prompt",
    "random": "write {red|blue}, with --dynamic-prompts",
    "wildcard": "write __name__, with --wildcards DIR",
    "wc": "write __name__, with --wildcards DIR",
    "alternate": "write [cat|dog]",
    "alt": "write [cat|dog]",
    "fromto": "write [cat:dog:0.5]",
    "break": "write BREAK",
    "trigger": "write the words themselves",
    "setvar": "write ${name=!value}, with --dynamic-prompts",
    "setmacro": "write ${name=value}, with --dynamic-prompts",
    "var": "write ${name}, with --dynamic-prompts",
    "macro": "write ${name}, with --dynamic-prompts",
    **dict.fromkeys(("param", "preset", "p"), "settings are options, such as --steps"),
    **dict.fromkeys(
        ("repeat", "segment", "clear", "object", "region", "extend", "comment"), "it has no counterpart here"
    ),
}
"""Tags of the web UI and of SwarmUI that are not LoRAs, and what to do about them."""
_WHY = {
    "lbw": "weights for single blocks are not supported",
    "lbwe": "weights for single blocks are not supported",
    "dyn": "a rank of its own is not supported",
    **dict.fromkeys(("start", "stop", "step"), "a LoRA for a part of the steps is not supported"),
}


@dataclass(frozen=True)
class Tags:
    """A prompt without its tags, the LoRAs that they ask for, and why others are not read, a sentence each."""

    text: str
    loras: tuple[LoraRef, ...] = ()
    refused: tuple[str, ...] = ()


def read_tags(prompt: str) -> Tags:
    """A prompt without its tags; see `take_tags`."""
    loras: list[LoraRef] = []
    refused: list[str] = []
    pieces, start = [], 0
    for match in _TAG.finditer(prompt):
        try:
            ref = _lora_of(match)
        except UsageError as error:
            refused.append(str(error))
        else:
            if ref is None:
                continue
            loras.append(ref)
        pieces.append(prompt[start : match.start()])
        start = match.end()
    if not loras and not refused:
        return Tags(prompt)
    return Tags("".join([*pieces, prompt[start:]]).strip(), tuple(loras), tuple(refused))


def take_tags(prompt: str, *, syntax: str = "a1111") -> tuple[str, tuple[LoraRef, ...]]:
    """A prompt without its tags, and what they ask for. Of plain prompts only LoRAs are tags.

    A tag is the web UI's: `<lora:NAME>`, `<lora:NAME:WEIGHT>` or `<lora:NAME:TEXT_WEIGHT:UNET_WEIGHT>` (in this order,
    the other way round than in `--lora`), where `te=WEIGHT` and `unet=WEIGHT` may stand as well; `lyco` is the same.
    Raises UsageError for other tags; `\\<` is a literal sign.
    """
    if syntax == "plain":
        refs = tuple(_ref_of_tag("lora", match[1]) for match in _LORA_TAG.finditer(prompt))
        return (_LORA_TAG.sub("", prompt).strip() if refs else prompt), refs
    tags = read_tags(prompt)
    if tags.refused:
        raise UsageError(tags.refused[0])
    return tags.text, tags.loras


def check_negative(prompt: str, *, syntax: str = "a1111") -> None:
    """Raise UsageError for a negative prompt with tags, which would be encoded as text."""
    for sentence in _in_negative(prompt) if syntax != "plain" else ():
        raise UsageError(f"negative_prompt: {sentence}")


def _in_negative(prompt: str) -> Iterator[str]:
    tags = read_tags(prompt)
    yield from tags.refused
    for ref in tags.loras:
        yield f"{tag(ref)} stands in the prompt; a LoRA holds for the whole image, and a negative weight takes it away"


def tag(ref: LoraRef) -> str:
    """The web UI's tag for a LoRA, by the name of its file: `<lora:NAME:WEIGHT>`."""
    both = f":{digits(ref.unet_weight)}" if ref.unet_weight != ref.text_weight else ""
    return f"<lora:{lora_name(ref)}:{digits(ref.text_weight)}{both}>"


def lora_name(ref: LoraRef) -> str:
    """What a LoRA is called in the web UI's texts: its file's name, without what has a meaning there."""
    return re.sub(r"[<>:,=\n]", "", Path(ref.path).name.removesuffix(".safetensors"))


def _lora_of(match: re.Match[str]) -> LoraRef | None:
    """The LoRA of a tag; None for what is text. Raises UsageError for every other tag."""
    written = match["bare"] or match["name"]
    kind = written.partition("[")[0].strip()
    name, shown = kind.lower(), match[0].strip()
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    if written in LORAS and match["end"]:
        return _ref_of_tag(written, match["inner"])
    if name in LORAS:
        raise UsageError(f"{shown} is not understood; a tag is <{name}:NAME:WEIGHT>")
    if name in _INSTEAD and (match["end"] or match["bare"] or len(name) > 3):
        raise UsageError(f"{shown} is not read here: {_INSTEAD[name]} (\\< is a literal sign)")
    if not match["end"] or written.partition("[")[0] != kind:
        return None
    hint = did_you_mean(name, [*LORAS, *_INSTEAD])
    raise UsageError(
        f"{shown}: there is no tag <{kind}:...>{hint or '; a LoRA is <lora:NAME:WEIGHT>'} (\\< is a literal sign)"
    )


def _ref_of_tag(kind: str, inner: str) -> LoraRef:
    """`NAME:0.8` -> the entry, by the web UI's rules."""
    named = dict(part.split("=", 1) for part in inner.split(":") if "=" in part)
    name, *weights = [part for part in inner.split(":") if "=" not in part] or [""]
    unknown = [key for key in named if key not in ("te", "unet")]
    if unknown and unknown[0] in _WHY:
        raise UsageError(f"<{kind}:{inner}>: {unknown[0]}={named[unknown[0]]}: {_WHY[unknown[0]]}; leave it out")
    if len(weights) > 2 or unknown:
        raise UsageError(f"<{kind}:{inner}> is not understood; a tag is <{kind}:NAME:WEIGHT>")
    text = named.get("te", weights[0] if weights else "1")
    unet = named.get("unet", weights[1] if len(weights) > 1 else text)
    try:
        return LoraRef.model_validate({"path": name.strip(), "unet_weight": unet, "text_weight": text})
    except ValidationError as error:
        raise UsageError(f"<{kind}:{inner}>: {first_problem(error)}") from None
