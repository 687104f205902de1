"""`generate --from IMAGE`: the settings that an image holds, as if they had been typed, less those not wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.models.adapter_files import is_in_folder, user_lora_folder
from sdcli.request.schema import NEEDS, did_you_mean, field_name


def recorded_fields(image: Path, *, console: Console, lora_dir: Path | None) -> dict[str, Any]:
    """The request that an image holds, as typed fields, without what another tool wrote and cannot be had here.

    Raises UsageError where it holds none.
    """
    from sdcli.metadata.read import read_image

    info = read_image(image)
    if info.request is None:
        raise UsageError(f"{image} holds no settings (sdcli info {image} shows what there is)")
    for name, value in info.unmapped.items():
        console.say(f"not taken over from {image}: {name} = {value}")
    fields = info.request.typed()
    if info.source != "sdcli":
        missing = [ref for ref in info.request.loras if not is_in_folder(ref, lora_dir)]
        for ref in missing:
            console.say(f"not taken over from {image}: no LoRA {ref.path!r} in {lora_dir or user_lora_folder()}")
        fields["loras"] = [str(ref) for ref in info.request.loras if ref not in missing]
    return fields


def left_of(recorded: Mapping[str, Any], without: str, *, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded fields without those that are named, `lora,mask`, and without what has no effect then.

    Raises UsageError for a field that is not recorded.
    """
    left = dict(recorded)
    for name in without.split(","):
        fields = ("width", "height") if name.strip() == "size" else (field_name(name.strip()),)
        for field in fields:
            if left.pop(field, None) is None:
                hint = did_you_mean(field, recorded)
                raise UsageError(f"--without: the picture's settings have no {name.strip()!r}{hint}")
    gone = recorded.keys() - left.keys()
    for field, others in NEEDS.items():  # what needs another of these comes after it
        if field in left and gone & set(others) and not {*left, *typed} & set(others):
            del left[field]
            gone |= {field}
    if "extend" in gone:  # the size was that of the extended image
        left = {field: value for field, value in left.items() if field not in ("width", "height")}
    return left


def kept(recorded: Mapping[str, Any], asked: Collection[str]) -> dict[str, Any]:
    """The recorded fields that stay where the fields `asked` are given anew."""
    gone = set(asked)
    if gone & {"init_image", "extend"}:  # the recorded size was that of another start
        gone |= {"width", "height"}
    if "guidance_scale" in gone:  # it says the whole schedule
        gone |= {"guidance_end"}
    return {name: value for name, value in recorded.items() if name not in gone}
