"""Short labels for images on a contact sheet: the fields in which they differ, or chosen fields."""

from __future__ import annotations

from collections.abc import Sequence

from sdcli.errors import UsageError
from sdcli.request.schema import GenerationRequest, did_you_mean, field_name, final_size

_SHORTENED = {
    "name": "",
    "seed": "seed",
    "steps": "steps",
    "guidance_scale": "cfg",
    "scheduler": "",
    "eta": "eta",
    "size": "",
    "width": "width",
    "height": "height",
    "model": "",
    "prompt": "",
    "negative_prompt": "not",
    "prompt_template": "in",
}
SHORT = _SHORTENED | {
    name: name.replace("_", " ")
    for name in GenerationRequest.model_fields
    if name not in _SHORTENED and name != "schema_version"
}
"""Field -> its name in a label. Short values come first, because long labels are cut at the end."""
_COMPARED = tuple(field for field in SHORT if field not in ("name", "width", "height"))


def parse_fields(text: str) -> tuple[str, ...]:
    """`"seed,cfg-scale"` -> names in SHORT, in that order. Raises UsageError."""
    fields = tuple(field_name(part.strip()) for part in text.split(","))
    for name in fields:
        if name not in SHORT:
            hint = did_you_mean(name, SHORT) or f"; there are {', '.join(SHORT)}"
            raise UsageError(f"--label: a label has no field {name!r}{hint}")
    return fields


def labels_of(
    names: Sequence[str], requests: Sequence[GenerationRequest | None], *, fields: Sequence[str] | None = None
) -> list[str]:
    """A label for each image, from its name and its request, if that is known.

    Without `fields` a label has the fields in which the requests differ, or the name if there is none. A field that a
    request lacks is left out of its label. Raises UsageError if no image has any of the chosen fields.
    """
    if fields is None:
        known = [request for request in requests if request is not None]
        fields = [field for field in _COMPARED if len({_value(field, "", request) for request in known}) > 1]
        labels = [_label(name, request, fields) for name, request in zip(names, requests, strict=True)]
        return [label or name for label, name in zip(labels, names, strict=True)]
    labels = [_label(name, request, fields) for name, request in zip(names, requests, strict=True)]
    if not any(labels):
        raise UsageError(f"--label: none of the images records its {' or '.join(fields).replace('_', ' ')}")
    return labels


def _label(name: str, request: GenerationRequest | None, fields: Sequence[str]) -> str:
    found = ((SHORT[field], _value(field, name, request)) for field in fields)
    return ", ".join(f"{short} {value}".strip() for short, value in found if value is not None)


def _value(field: str, name: str, request: GenerationRequest | None) -> str | None:
    """One field as a short text; None if it is unknown."""
    if field == "name":
        return name
    if request is None:
        return None
    if field in ("size", "width", "height") and request.width and request.height:
        width, height = map(str, final_size(request.width, request.height, request.upscale))
        return {"size": f"{width}x{height}", "width": width, "height": height}[field]
    if field == "size":
        return None
    value = getattr(request, field)
    if value is None or value == ():
        return None
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
