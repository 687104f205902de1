"""Differences of two images: of their requests, of the facts in their records, and of their pixels as an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageChops

from sdcli.metadata.read import ImageInfo

Differences = dict[str, tuple[Any, Any]]
"""A field's name -> its two values; None for a missing one."""


def differing_request(a: ImageInfo, b: ImageInfo) -> Differences | None:
    """The fields in which two images' requests differ, whichever tools wrote them; None unless both have a request."""
    if a.request is None or b.request is None:
        return None
    return _differing(a.request.typed(), b.request.typed())


def differing_facts(a: ImageInfo, b: ImageInfo) -> Differences | None:
    """The facts in which two records differ, nested ones under names such as `weights.unet`.

    Facts are the provenance in sdcli's records, and the unmapped fields in those of other tools. None unless the same
    tool wrote both.
    """
    if a.source is None or a.source != b.source:
        return None
    return _differing(dict(_flat(_facts(a))), dict(_flat(_facts(b))))


def difference_image(a: Image.Image, b: Image.Image, *, factor: float) -> Image.Image:
    """|a - b| of two RGB images of equal size, multiplied by `factor` and clipped to 255."""
    return ImageChops.difference(a, b).point([min(255, round(level * factor)) for level in range(256)] * 3)


def _facts(info: ImageInfo) -> Mapping[str, Any]:
    return info.record.provenance if info.record is not None else info.unmapped


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Differences:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
