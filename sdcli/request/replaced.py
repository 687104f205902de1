"""What is left of recorded or typed fields of a request where others take their place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sdcli.errors import UsageError
from sdcli.request.schema import NEEDS, did_you_mean, field_name

PRESET_FIELDS = ("scheduler", "steps", "guidance_scale", "guidance_rescale", "guidance_interval", "reuse")
"""What `--fast` decides anew."""


def without_named(recorded: Mapping[str, Any], without: str, *, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those named in `lora,mask`, and without those that have no effect then."""
    left = dict(recorded)
    for name in without.split(","):
        fields = ("width", "height") if name.strip() == "size" else (field_name(name.strip()),)
        for field in fields:
            if left.pop(field, None) is None:
                hint = did_you_mean(field, recorded)
                raise UsageError(f"--without: the settings of the image have no {name.strip()!r}{hint}")
    if "guidance_scale" not in left:
        left.pop("guidance_end", None)  # a scale is a whole schedule
    gone = recorded.keys() - left.keys()
    for field, others in NEEDS.items():  # a field that needs others comes after them in this table
        if field in left and gone & set(others) and not {*left, *typed} & set(others):
            del left[field]
            gone |= {field}
    return _without_size(left) if "extend" in gone else left  # the size was that of the extended image


def without_replaced(recorded: Mapping[str, Any], replaced: Collection[str]) -> dict[str, Any]:
    """The fields without the `replaced` ones and without those that only go with the old values."""
    gone = {*replaced, *(PRESET_FIELDS if "fast" in replaced else [])}
    gone |= {"guidance_end"} if "guidance_scale" in gone else set()  # a scale is a whole schedule
    left = {name: value for name, value in recorded.items() if name not in gone}
    return _without_size(left) if gone & {"init_image", "extend"} else left  # the size was that of another init image


def given_fields(own: Mapping[str, Any], typed: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line: its own ones, over typed ones, over recorded ones, each without what it replaces."""
    scales = {"guidance_scale"} & own.keys() & typed.keys()
    return {**without_replaced(recorded, {*typed, *own}), **without_replaced(typed, scales), **own}


def _without_size(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("width", "height")}
