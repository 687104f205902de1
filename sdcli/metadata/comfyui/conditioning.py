"""The prompt behind a ComfyUI sampler's `positive` or `negative`: text encoders, and the nodes that combine them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from sdcli.errors import UsageError
from sdcli.metadata.comfyui.graph import Node, Output
from sdcli.metadata.comfyui.reading import MAX_DEPTH, Reading, described
from sdcli.metadata.comfyui.syntax import ConvertedPrompt, converted
from sdcli.metadata.comfyui.values import Known, Unknown
from sdcli.request.prompt_syntax import MAX_PARTS


@dataclass(frozen=True)
class Prompt:
    """What a conditioning says in sdcli's syntax; `why_not` is the reason why it cannot be said."""

    parts: tuple[str, ...] = ()
    """The prompts that are combined with equal weights."""
    known: tuple[Known, ...] = ()
    """The texts with the inputs that they come from."""
    encoders: tuple[Node, ...] = ()
    clips: tuple[Output, ...] = ()
    """The text encoders that are used."""
    changed: bool = False
    """Bounded to an area, a part of the steps, or by a ControlNet: it cannot be a part of another."""
    escaped: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    followed: tuple[Node, ...] = ()
    """Nodes that are said by the text."""
    why_not: str | None = None

    @property
    def text(self) -> str | None:
        """The prompt; AND joins those that are combined, each with its share."""
        if self.why_not is not None:
            return None
        if len(self.parts) == 1:
            return self.parts[0]
        share = f"{1 / len(self.parts):.6f}".rstrip("0")
        return " AND ".join(f"{part} :{share}" for part in self.parts)


def read_prompt(reading: Reading, given: Any, role: str) -> Prompt:
    """The prompt of a conditioning. `given` is the link to it, `role` the sampler's input, positive or negative."""
    output = reading.graph.linked(given)
    if output is None:
        missing = f"it is linked to node {given[0]}, which is missing" if reading.graph.is_link(given) else ""
        return Prompt(why_not=missing or "nothing is linked to it")
    return _Conditioning(reading).read(output, role, 0)


def take_prompt(reading: Reading, prompt: Prompt, role: str, field: str) -> None:
    """Take a prompt over into a field of the request, or name what was found of it."""
    text = prompt.text
    texts = list(dict.fromkeys(str(known.value) for known in prompt.known))
    if text is not None and role == "negative" and len(prompt.parts) > 1:
        text = None
    for node in prompt.encoders:
        reading.understand(node)
    if text is None:
        several = len(texts) > 1
        reading.unmapped[role] = texts if several else f"not known: {prompt.why_not}"
        return
    reading.found[field] = text
    for known in prompt.known:
        reading.take(known)
    for node in prompt.followed:
        reading.understand(node)
    reading.escaped += prompt.escaped
    reading.embeddings += prompt.embeddings


def settle_encoders(reading: Reading, prompt: Prompt) -> None:
    """Ignore settings of encoders that change nothing, and SDXL's sizes where they are those of the image, as here."""
    for node in prompt.encoders:
        reading.settle(node, {"token_normalization": "none", "weight_interpretation": "comfy", "parser": "comfy"})
        for side in ("width", "height") if node.kind == "CLIPTextEncodeSDXL" else ():
            size = reading.found.get(side)
            reading.settle(node, {side: size, f"target_{side}": size, f"crop_{side[0]}": 0})


ENCODERS: dict[str, tuple[str, ...]] = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("text",),
    "CLIPTextEncodeSD3": ("t5xxl", "clip_g", "clip_l"),
    "CLIPTextEncodeFlux": ("t5xxl", "clip_l"),
    "CLIPTextEncodeHunyuanDiT": ("mt5xl", "bert"),
    "BNK_CLIPTextEncodeAdvanced": ("text",),
    "smZ CLIPTextEncode": ("text",),
}
"""Text encoders: their texts, the one that becomes the prompt first."""


class _Conditioning:
    """Walks conditioning nodes, each once."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._read: dict[tuple[str, int, str], Prompt] = {}

    def read(self, output: Output, role: str, depth: int) -> Prompt:
        key = output.node.id, output.slot, role
        if key not in self._read:
            self._read[key] = Prompt(why_not=f"{described(output)} is a part of a loop")
            if depth > MAX_DEPTH:
                return Prompt(why_not="too many nodes stand before it")
            self._read[key] = self._node(output, role, depth + 1)
        return self._read[key]

    def _node(self, output: Output, role: str, depth: int) -> Prompt:
        node, kind = output.node, output.node.kind
        if kind in ENCODERS:
            return self._encoded(node, ENCODERS[kind])
        if kind == "Efficient Loader":
            name = {1: "positive", 2: "negative"}.get(output.slot)
            return replace(self._encoded(node, (name,) if name else ()), clips=(output,))
        if kind == "ConditioningZeroOut":
            return replace(self._through(node, "conditioning", role, depth), why_not=f"{described(output)} removes it")
        if kind == "ConditioningCombine":
            return self._combined(output, role, depth)
        if kind == "ConditioningConcat":
            return self._concatenated(output, role, depth)
        if kind == "ConditioningAverage":
            return self._averaged(output, role, depth)
        links = self._reading.graph.links(node)
        if {"positive", "negative"} & links.keys():
            side = {0: "positive", 1: "negative"}.get(output.slot)
            if side is None or side not in links or (side != role and kind not in _TWO_SIDED):
                return Prompt(why_not=f"{described(output)} is not understood")
            return replace(self.read(links[side], role, depth), changed=True)
        names = [name for name in links if name.startswith("cond")]
        names = names or (list(links) if len(links) == 1 and "clip" not in links else [])
        if len(names) != 1 or output.slot != 0:
            return Prompt(why_not=f"{described(output)} is not understood", clips=self._clips(node))
        return replace(self.read(links[names[0]], role, depth), changed=True)

    def _through(self, node: Node, name: str, role: str, depth: int) -> Prompt:
        source = self._reading.graph.source(node, name)
        if source is None:
            return Prompt(why_not=f"node {node.id} ({node.kind}) has no conditioning")
        return self.read(source, role, depth)

    def _clips(self, node: Node) -> tuple[Output, ...]:
        clip = self._reading.graph.source(node, "clip")
        return (clip,) if clip is not None else ()

    def _encoded(self, node: Node, names: tuple[str, ...]) -> Prompt:
        """A text encoder. Where its texts differ the first one counts that is not empty; the others are named."""
        base = Prompt(encoders=(node,), clips=self._clips(node))
        found: list[Known] = []
        for name in names:
            try:
                found.append(self._reading.values.of(node, name))
            except Unknown as error:
                return replace(base, why_not=f"its {name} {error}", known=tuple(found))
            if not isinstance(found[-1].value, str):
                return replace(base, why_not=f"its {name} is no text in node {node.id} ({node.kind})")
        if not found:
            return replace(base, why_not=f"node {node.id} ({node.kind}) is not understood")
        first = next((one.value for one in found if one.value), "")
        known = [one for one in found if one.value == first]
        try:
            text = self._converted(node, known[0].value)
        except UsageError as error:
            return replace(base, why_not=str(error), known=(known[0],))
        return replace(base, parts=(text.text,), known=tuple(known), escaped=text.escaped, embeddings=text.embeddings)

    def _converted(self, node: Node, text: str) -> ConvertedPrompt:
        """Some encoders of others read A1111's syntax."""
        parser = self._reading.peek(node, "parser") if node.kind == "smZ CLIPTextEncode" else "comfy"
        if parser not in ("A1111", "full"):
            return converted(text)
        if re.search(r"\bAND\b|<\w+:", text):
            raise UsageError("its text is in a syntax that is not understood")
        return ConvertedPrompt(text)

    def _combined(self, output: Output, role: str, depth: int) -> Prompt:
        """The mean of the predictions for both: AND with equal weights."""
        node = output.node
        both = [self._through(node, name, role, depth) for name in ("conditioning_1", "conditioning_2")]
        parts = tuple(part for prompt in both for part in prompt.parts)
        why_not = next((prompt.why_not for prompt in both if prompt.why_not is not None), None)
        if why_not is None and (any(prompt.changed for prompt in both) or len(parts) > MAX_PARTS):
            why_not = f"{described(output)} combines what has no prompt here"
        return self._joined(node, both, parts[: MAX_PARTS + 1], why_not)

    def _concatenated(self, output: Output, role: str, depth: int) -> Prompt:
        """The tokens of both, one after the other: BREAK."""
        node = output.node
        both = [self._through(node, name, role, depth) for name in ("conditioning_to", "conditioning_from")]
        why_not = next((prompt.why_not for prompt in both if prompt.why_not is not None), None)
        if why_not is None and any(prompt.changed or len(prompt.parts) > 1 for prompt in both):
            why_not = f"{described(output)} joins what has no prompt here"
        if why_not is None and sum(len(part) for prompt in both for part in prompt.parts) > 100_000:
            why_not = f"{described(output)} makes too long a prompt"
        parts = () if why_not else (" BREAK ".join(prompt.parts[0] for prompt in both),)
        return self._joined(node, both, parts, why_not)

    def _averaged(self, output: Output, role: str, depth: int) -> Prompt:
        """A mix of two: a prompt only if one of them has no share in it."""
        node = output.node
        share = self._reading.peek(node, "conditioning_to_strength")
        to, other = (self._through(node, name, role, depth) for name in ("conditioning_to", "conditioning_from"))
        if share == 1:
            return replace(to, followed=(*to.followed, node), known=to.known)
        why_not = to.why_not or other.why_not or f"{described(output)} mixes two prompts"
        return self._joined(node, [to, other], (), why_not)

    def _joined(self, node: Node, both: list[Prompt], parts: tuple[str, ...], why_not: str | None) -> Prompt:
        def unique(items: list[Any]) -> tuple[Any, ...]:
            return tuple(dict.fromkeys(items))

        return Prompt(
            parts=parts,
            known=unique([known for prompt in both for known in prompt.known])[: MAX_PARTS + 1],
            encoders=unique([encoder for prompt in both for encoder in prompt.encoders]),
            clips=unique([clip for prompt in both for clip in prompt.clips]),
            escaped=unique([name for prompt in both for name in prompt.escaped]),
            embeddings=unique([word for prompt in both for word in prompt.embeddings]),
            followed=unique([node, *(one for prompt in both for one in prompt.followed)]),
            why_not=why_not,
        )


_TWO_SIDED = frozenset({"ControlNetApplyAdvanced", "ControlNetApplySD3", "InpaintModelConditioning"})
"""Nodes whose outputs are the positive and the negative conditioning, whatever they are linked to."""
