"""What has been read of a ComfyUI graph so far: which inputs were taken over, and the names of all that were not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sdcli.metadata.comfyui.graph import Graph, Node, Output
from sdcli.metadata.comfyui.values import Known, Unknown, Values

MAX_SHOWN = 500
"""Longer texts among what is named are cut to this many characters."""
MAX_DEPTH = 100
"""Conditioning nodes, one behind the other."""


class Reading:
    """Takes over inputs one by one; `rest` then names every other input of the nodes that took part."""

    def __init__(self, graph: Graph, values: Values) -> None:
        self.graph = graph
        self.values = values
        self.found: dict[str, Any] = {}
        """Fields of the request."""
        self.unmapped: dict[str, Any] = {}
        self.escaped: list[str] = []
        """What prompts have in them that means something here alone."""
        self.embeddings: list[str] = []
        """The words for textual inversions in prompts."""
        self._taken: set[tuple[str, str]] = set()
        self._understood: set[str] = set()

    def value(self, node: Node, name: str) -> Any:
        """The value of an input, taken over. Raises Unknown."""
        known = self.values.of(node, name)
        self.take(known)
        return known.value

    def peek(self, node: Node, name: str, default: Any = None) -> Any:
        """The value of an input, not taken over; the default where it is unknown."""
        try:
            return self.values.of(node, name).value
        except Unknown:
            return default

    def given(self, node: Node, name: str) -> Any:
        """The value of an input of a field, taken over; None where it is unknown, which `unmapped` then says."""
        try:
            return self.value(node, name)
        except Unknown as error:
            self._taken.add((node.id, name))
            self.unmapped[name] = f"not known: it {error}"
            return None

    def take(self, known: Known, *, but: Node | None = None) -> None:
        """Count a value as taken over, and the nodes that computed it as understood, `but` for a node's own input."""
        sources = {(id, name) for id, name in known.sources if but is None or id != but.id}
        self._taken |= sources
        self._understood |= {id for id, _ in sources}

    def ignore(self, node: Node, *names: str) -> None:
        """Count inputs as settled: they have no effect, or are said already."""
        self._taken |= {(node.id, name) for name in names}

    def understand(self, node: Node) -> None:
        """Count a node as followed: only its inputs that are not taken over are named, and it is not."""
        self._understood.add(node.id)

    def include(self, other: Reading) -> None:
        """Count what another reading took over as taken over, too."""
        self._taken |= other._taken
        self._understood |= other._understood

    def settle(self, node: Node, usual: Mapping[str, Any]) -> None:
        """Ignore the inputs that have their usual values, with which they have no effect."""
        for name, value in usual.items():
            try:
                known = self.values.of(node, name)
            except Unknown:
                continue
            if _same(known.value, value):
                self.take(known)

    def rest(self, nodes: Iterable[Node]) -> dict[str, Any]:
        """Every input of the nodes that was not taken over, by the node's kind (and id, where there are several)."""
        left: dict[str, list[tuple[Node, dict[str, Any]]]] = {}
        for node in nodes:
            inputs = {
                shown(name): shown(value) for name, value in node.inputs.items() if self._is_left(node, name, value)
            }
            if inputs or (node.id not in self._understood and node.kind not in NEUTRAL):
                left.setdefault(node.kind, []).append((node, inputs))
        named = {}
        for kind, several in left.items():
            for node, inputs in several:
                alone = len(several) == 1 and kind not in self.unmapped
                named[shown(kind if alone else f"{kind} {node.id}")] = inputs or True
        return named

    def _is_left(self, node: Node, name: str, value: Any) -> bool:
        if (node.id, name) in self._taken or name in _IDLE.get(node.kind, _NEVER):
            return False
        return self.graph.linked(value) is None


_NEVER = frozenset({"control_after_generate", "speak_and_recognation"})
"""Inputs of the user interface, which change nothing."""
_SAVING = _NEVER | {"filename_prefix"}
_IDLE = dict.fromkeys(("SaveImage", "SaveImageWebsocket", "SaveLatent", "PreviewImage", "Image Save"), _SAVING)
"""The inputs of a node that change nothing in the image."""

NEUTRAL = frozenset(
    {
        "VAEDecode", "SaveImage", "SaveImageWebsocket", "PreviewImage", "Image Save", "SaveLatent",
        "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean",
        "KSamplerSelect", "BasicGuider", "CFGGuider",
    }
)  # fmt: skip
"""Nodes that are not worth naming where nothing is left of their inputs."""


def shown(value: Any) -> Any:
    """A value that JSON has a form for, and that is not too long to print."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        value = value.encode(errors="replace").decode()  # halves of characters
        return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}... ({len(value):,} characters)"
    if isinstance(value, list | dict):
        text = json.dumps(value)
        if len(text) > MAX_SHOWN:
            return f"{text[:MAX_SHOWN]}... ({len(text):,} characters)"
        return (
            [shown(one) for one in value]
            if isinstance(value, list)
            else {shown(key): shown(one) for key, one in value.items()}
        )
    return value


def _same(value: Any, usual: Any) -> bool:
    if isinstance(usual, str) or isinstance(value, str):
        return bool(value == usual)
    if isinstance(usual, float) and isinstance(value, int | float):
        return math.isclose(value, usual, rel_tol=1e-4)
    return bool(value == usual)


def described(output: Output) -> str:
    """A node in a sentence: `node 12 (Foo)`."""
    return f"node {output.node.id} ({output.node.kind})"
