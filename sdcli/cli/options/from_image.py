"""`generate --from IMAGE`: the settings stored in an image, as if they had been typed, without those to be replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.models.adapter_files import is_in_folder, user_lora_folder
from sdcli.request.schema import NEEDS, did_you_mean, field_name

PRESET_FIELDS = ("scheduler", "steps", "guidance_scale", "guidance_rescale", "guidance_interval", "reuse")
"""What `--fast` decides anew."""


def recorded_fields(
    image: Path,
    *,
    without: str | None,
    typed: Mapping[str, Any],
    replaced: Collection[str],
    console: Console,
    lora_dir: Path | None,
) -> dict[str, Any]:
    """The fields of the request stored in an image, without those named by `without` and those `replaced` by options.

    Of other tools' images, settings without a counterpart, LoRAs that are not here, and a prompt that is not known are
    left out, with a note.
    Raises UsageError for an image without settings.
    """
    from sdcli.metadata.read import read_image

    info = read_image(image)
    if info.request is None:
        raise UsageError(f"{image} holds no settings (sdcli info {image} shows its metadata)")
    for name, value in info.unmapped.items():
        console.note(f"not taken from {image}: {name} = {value}")
    fields = info.request.typed()
    if info.source != "sdcli":
        missing = [ref for ref in info.request.loras if not is_in_folder(ref, lora_dir)]
        for ref in missing:
            console.note(f"not taken from {image}: no LoRA {ref.path!r} in {lora_dir or user_lora_folder()}")
        fields["loras"] = [str(ref) for ref in info.request.loras if ref not in missing]
        if "prompt" not in info.request.model_fields_set:
            console.note(f"not taken from {image}: its prompt, which is not known; give one")
            del fields["prompt"]
    if without is not None:
        fields = without_named(fields, without, typed=typed)
    return without_replaced(fields, replaced)


def without_named(recorded: Mapping[str, Any], without: str, *, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those named in `lora,mask`, and without those that have no effect then."""
    left = dict(recorded)
    for name in without.split(","):
        fields = ("width", "height") if name.strip() == "size" else (field_name(name.strip()),)
        for field in fields:
            if left.pop(field, None) is None:
                hint = did_you_mean(field, recorded)
                raise UsageError(f"--without: the settings of the image have no {name.strip()!r}{hint}")
    gone = recorded.keys() - left.keys()
    for field, others in NEEDS.items():  # a field that needs others comes after them in this table
        if field in left and gone & set(others) and not {*left, *typed} & set(others):
            del left[field]
            gone |= {field}
    return _without_size(left) if "extend" in gone else left  # the size was that of the extended image


def without_replaced(recorded: dict[str, Any], replaced: Collection[str]) -> dict[str, Any]:
    """The fields without the `replaced` ones and without those that only go with the old values."""
    gone = {*replaced, *(PRESET_FIELDS if "fast" in replaced else [])}
    gone |= {"guidance_end"} if "guidance_scale" in gone else set()  # a scale is a whole schedule
    left = {name: value for name, value in recorded.items() if name not in gone}
    return _without_size(left) if gone & {"init_image", "extend"} else left  # the size was that of another init image


def _without_size(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("width", "height")}
