"""What two images' records say differently, and an image of where their pixels differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageChops

from sdcli.metadata.record import ImageInfo

Differences = dict[str, tuple[Any, Any]]
"""A field's name -> its two values; None where one has no such field."""


def differing_request(a: ImageInfo, b: ImageInfo) -> Differences | None:
    """The fields of the requests that differ, whichever tools wrote them; None unless both images have one."""
    if a.request is None or b.request is None:
        return None
    return _differing(a.request.typed(), b.request.typed())


def differing_facts(a: ImageInfo, b: ImageInfo) -> Differences | None:
    """The facts of the two runs that differ, those inside others under names like `weights.unet`.

    sdcli's records hold facts as provenance, those of other tools as what has no field in a request; None unless the
    same tool wrote both.
    """
    if a.source is None or a.source != b.source:
        return None
    return _differing(dict(_flat(_facts(a))), dict(_flat(_facts(b))))


def difference_image(a: Image.Image, b: Image.Image, *, factor: float) -> Image.Image:
    """|a - b| of two RGB images of equal size, `factor` times as large; what is above 255 is cut off."""
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
