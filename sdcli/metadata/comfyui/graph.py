"""ComfyUI's graph of nodes as data: its links, the nodes that save images, and the samplers that made them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_CHAINS = 16
"""More ways from a saved image back to a sampler are not distinguished."""
MAX_PASSES = 64
"""Samplers, one behind the other; a longer chain is not followed."""
MAX_REROUTES = 64
"""Nodes that only pass a link on, one behind the other."""


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the graph. An input is a plain value, or the link `[id, slot]` to another node's output."""

    id: str
    kind: str
    """ComfyUI's `class_type`."""
    inputs: Mapping[str, Any]


class Output(NamedTuple):
    """An output of a node, by its number from 0."""

    node: Node
    slot: int


class Graph:
    """The nodes by their ids. Links may be missing, of the wrong type, or form cycles: every walk here ends."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self._links: dict[str, dict[str, Output]] = {}
        self._users = {output.node.id for node in nodes.values() for output in self.links(node).values()}

    def is_link(self, value: Any) -> bool:
        """Whether a value has the form of a link, also of one to a node that is missing."""
        if not isinstance(value, list) or len(value) != 2 or isinstance(value[1], bool):
            return False
        return isinstance(value[0], str | int) and isinstance(value[1], int) and not isinstance(value[0], bool)

    def linked(self, value: Any) -> Output | None:
        """The output that a value is a link to, behind reroutes; None for any other value and for a missing node."""
        for _ in range(MAX_REROUTES):  # they may form a cycle
            node = self.nodes.get(str(value[0])) if self.is_link(value) else None
            if node is None:
                return None
            if node.kind not in REROUTES:
                return Output(node, value[1])
            value = next((given for given in node.inputs.values() if self.is_link(given)), None)
        return None

    def source(self, node: Node, name: str) -> Output | None:
        """The output that an input is linked to."""
        return self.linked(node.inputs.get(name))

    def links(self, node: Node) -> dict[str, Output]:
        """The inputs of a node that are linked to a node that is there."""
        if node.id not in self._links:
            found = {name: self.linked(value) for name, value in node.inputs.items()}
            self._links[node.id] = {name: output for name, output in found.items() if output is not None}
        return self._links[node.id]

    def upstream(self, roots: list[Node]) -> list[Node]:
        """The nodes and all that they are made from, nearest first."""
        seen = {node.id: node for node in roots}
        waiting = list(seen.values())
        for node in waiting:  # grows while it is walked
            for output in self.links(node).values():
                if output.node.id not in seen:
                    seen[output.node.id] = output.node
                    waiting.append(output.node)
        return waiting

    def outputs(self) -> list[Node]:
        """The nodes that the saved image may come from: those that save, else those that preview, else the ends."""
        ends = [node for node in self.nodes.values() if self.image_sources(node) and not is_sampler(self, node)]
        saving = [node for node in ends if _SAVES.search(node.kind) and node.kind != "SaveLatent"]
        previews = [node for node in ends if node.id not in self._users and _PREVIEWS.search(node.kind)]
        return saving or previews or [node for node in self.nodes.values() if node.id not in self._users]

    def image_sources(self, node: Node) -> list[Output]:
        """The outputs that a node's image or latent is made from."""
        links = self.links(node)
        named = [output for name, output in links.items() if _IMAGES.match(name)]
        return list(dict.fromkeys(named))

    def samplers(self, root: Node) -> list[Node]:
        """The nearest samplers behind the image or latent of a node, or the node itself if it is one."""
        if is_sampler(self, root):
            return [root]
        return self.samplers_behind(root)

    def samplers_behind(self, root: Node) -> list[Node]:
        """The nearest samplers that a node's image or latent is made from."""
        found: dict[str, Node] = {}
        seen, waiting = {root.id}, [root]
        for node in waiting:
            sources = self.image_sources(node) or ([] if node is root else self._only_link(node))
            for output in sources:
                if is_sampler(self, output.node):
                    found[output.node.id] = output.node
                elif output.node.id not in seen:
                    seen.add(output.node.id)
                    waiting.append(output.node)
        return list(found.values())

    def path(self, start: Node, end: Node) -> list[Node] | None:
        """The nodes between a sampler's latent and the sampler `end`, where there is one way; None for several."""
        between: list[Node] = []
        node = start
        for _ in range(len(self.nodes)):
            sources = self.image_sources(node) or self._only_link(node)
            if len(sources) != 1:
                return None
            node = sources[0].node
            if node is end:
                return between
            between.append(node)
        return None

    def _only_link(self, node: Node) -> list[Output]:
        """The link of a node that has a single one."""
        links = list(self.links(node).values())
        return links if len(links) == 1 else []


REROUTES = frozenset({"Reroute", "Reroute (rgthree)", "ReroutePrimitive|pysssss"})
_SAVES = re.compile(r"save|websocket", re.IGNORECASE)
_PREVIEWS = re.compile(r"preview|display|show", re.IGNORECASE)
_IMAGES = re.compile(r"(?:images?|pixels|samples|latents?|destination|source|frames)(?:$|_|\d)")
_SAMPLER_INPUTS = frozenset({"latent_image", "latent"})


def is_sampler(graph: Graph, node: Node) -> bool:
    """Whether a node denoises a latent: ComfyUI's own samplers, and others with inputs of the same names."""
    if node.kind in ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"):
        return True
    return (
        {"positive", "negative", "steps", "model"} <= node.inputs.keys()
        and not _SAMPLER_INPUTS.isdisjoint(node.inputs)
        and not {"seed", "noise_seed"}.isdisjoint(node.inputs)
    )


def chains(graph: Graph, root: Node, is_full: Callable[[Node], bool]) -> list[list[Node]]:
    """The ways from a node back to the sampler that began its image: samplers, the last one first.

    `is_full` says of a sampler whether nothing is left of the latent that it starts from. At most MAX_CHAINS.
    """
    done: list[list[Node]] = []
    waiting = [[node] for node in graph.samplers(root)]
    for _ in range(MAX_CHAINS * MAX_PASSES):
        if not waiting or len(done) >= MAX_CHAINS:
            break
        chain = waiting.pop()
        before = [] if is_full(chain[-1]) else graph.samplers_behind(chain[-1])
        longer = [[*chain, node] for node in before if node not in chain]
        if not longer:
            done.append(chain)
        elif len(chain) < MAX_PASSES:
            waiting += longer[:MAX_CHAINS]
    return done
