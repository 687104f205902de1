"""The size that a ComfyUI sampler starts from, and a second pass over an enlarged image."""

from __future__ import annotations

import math
from typing import Any

from sdcli.metadata.comfyui.graph import Graph, Node
from sdcli.metadata.comfyui.reading import Reading
from sdcli.metadata.comfyui.sampling import Sampler, guided_by
from sdcli.metadata.comfyui.values import Unknown

_EMPTY = {
    "EmptyLatentImage": "",
    "EmptySD3LatentImage": "",
    "EmptyFlux2LatentImage": "",
    "Efficient Loader": "empty_latent_",
}
"""Nodes of an empty latent, and what their width and height begin with."""
_SAME_SIZE = frozenset({"RepeatLatentBatch", "LatentFromBatch", "SetLatentNoiseMask", "LatentAddNoise"})
"""Nodes of a latent that keep its size."""


def read_size(reading: Reading, sampler: Sampler) -> None:
    """Take over width and height of the empty latent that a sampler starts from."""
    node = latent_of(reading.graph, sampler.node)
    for _ in range(len(reading.graph.nodes)):
        if node is None or node.kind not in _SAME_SIZE:
            break
        source = reading.graph.source(node, "samples")
        node = source.node if source is not None else None
    if node is None or node.kind not in _EMPTY:
        return
    for side in ("width", "height"):
        try:
            reading.found[side] = reading.value(node, _EMPTY[node.kind] + side)
        except Unknown as error:
            reading.ignore(node, _EMPTY[node.kind] + side)
            reading.unmapped[side] = f"not known: it {error}"
    count = reading.peek(node, "batch_size", 1)
    if not isinstance(count, bool) and count != 1:
        reading.unmapped["batch_size"] = count
    reading.ignore(node, "batch_size")
    reading.understand(node)


def latent_of(graph: Graph, node: Node) -> Node | None:
    """The node that makes a sampler's latent."""
    source = graph.source(node, "latent_image") or graph.source(node, "latent")
    return source.node if source is not None else None


def read_second_pass(reading: Reading, second: Sampler, first: Sampler) -> None:
    """Take over a second pass as `upscale`, where it enlarges the image; what differs from ours is left to be named."""
    between = reading.graph.path(second.node, first.node)
    if between is None or second.sigmas is not second.node or second.node.kind not in ("KSampler",):
        return
    factor = _factor(reading, between)
    denoise = reading.peek(second.node, "denoise")
    if factor is None or not isinstance(denoise, int | float) or isinstance(denoise, bool):
        return
    if not (1 < factor <= 8 and 0 < denoise <= 1):
        return
    how = "pixel" if any(node.kind in _DECODERS for node in between) else "latent"
    reading.found["upscale"] = {"factor": factor, "strength": denoise, "how": how}
    reading.take(reading.values.of(second.node, "denoise"))
    for node in between:
        reading.understand(node)
        reading.ignore(node, *_RESIZERS.get(node.kind, ()))
    _same_settings(reading, second, first, denoise)
    reading.understand(second.node)


_DECODERS = frozenset({"VAEDecode", "VAEDecodeTiled"})
_BETWEEN = _DECODERS | {"VAEEncode", "VAEEncodeTiled"}
_RESIZERS: dict[str, tuple[str, ...]] = {
    "LatentUpscale": ("width", "height"),
    "LatentUpscaleBy": ("scale_by",),
    "ImageScale": ("width", "height"),
    "ImageScaleBy": ("scale_by",),
}


def _factor(reading: Reading, between: list[Node]) -> float | None:
    """By how much the nodes between two passes enlarge the image, if it is certain."""
    resizers = [node for node in between if node.kind in _RESIZERS]
    others = [node for node in between if node not in resizers]
    if len(resizers) != 1 or any(node.kind not in _BETWEEN for node in others):
        return None
    (resizer,) = resizers
    given = [reading.peek(resizer, name) for name in _RESIZERS[resizer.kind]]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return None
    if len(given) == 1:
        return _short(given[0])
    size = [reading.found.get("width"), reading.found.get("height")]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        return None
    if reading.peek(resizer, "crop", "disabled") != "disabled" and given[0] * size[1] != given[1] * size[0]:
        return None
    factors = [value / side for value, side in zip(given, size, strict=True)]
    return _short(factors[0]) if math.isclose(*factors) else None


def _short(factor: Any) -> float | None:
    return round(float(factor), 6) if math.isfinite(factor) else None


def _same_settings(reading: Reading, second: Sampler, first: Sampler, denoise: float) -> None:
    """Settle the settings of the second pass that are those of the first one, which sdcli uses for both."""
    node, graph = second.node, reading.graph
    steps, other = reading.peek(node, "steps"), reading.found.get("steps")
    if isinstance(other, int) and steps == int(other * denoise):
        reading.ignore(node, "steps")
    own = {"cfg": first.settings, "sampler_name": first.sampler, "scheduler": first.sigmas, "seed": first.noise}
    for name, holder in own.items():
        if holder is not None and reading.peek(node, name, _MISSING) == reading.peek(holder, name):
            reading.ignore(node, name)
    for role in ("positive", "negative"):
        if guided_by(second, role) != guided_by(first, role):
            reading.unmapped[f"second_pass_{role}"] = "not that of the first pass"
    if first.settings is not None and graph.source(node, "model") != graph.source(first.settings, "model"):
        reading.unmapped["second_pass_model"] = "not that of the first pass"


_MISSING = object()
