"""The settings stored in an uploaded image, divided into what a request to this server can have and what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdcli.metadata.read import ImageInfo, read_image_bytes
from sdcli.models.adapter_files import is_in_folder
from sdcli.request.schema import NEEDS

FILES = ("init_image", "mask", "controls", "ip_adapters", "embeddings")
"""Fields whose files are not in the metadata, only their names."""


def uploaded_settings(
    data: bytes, *, is_usable: Callable[[str], bool], lora_dir: Path | None
) -> tuple[ImageInfo, dict[str, Any] | None, dict[str, Any]]:
    """The bytes of an image -> its info, the fields of a request (None without a record), and what was not taken over.

    Models are taken over by name where `is_usable` says so, LoRAs by the names in their folder. Raises BadImage.
    """
    info, _ = read_image_bytes(data, name="image")
    left = dict(info.unmapped)
    if info.request is None:
        return info, None, left
    fields = info.request.typed()
    del fields["schema"]
    if info.source != "sdcli" and "prompt" not in info.request.model_fields_set:
        del fields["prompt"]
    for name in ("model", "refiner"):
        if name in fields and not is_usable(fields[name]):
            left[name] = f"{fields.pop(name)}: not a model of this server"
    missing = [ref for ref in info.request.loras if not is_in_folder(ref, lora_dir)]
    if missing:
        left["loras"] = [f"{ref}: not a LoRA of this server" for ref in missing]
        found = [one.model_dump(mode="json", exclude_none=True) for one in info.request.loras if one not in missing]
        fields = {**fields, "loras": found} if found else {name: fields[name] for name in fields if name != "loras"}
    for name in FILES:
        if name in fields:
            value = getattr(info.request, name)
            left[name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            del fields[name]
    for name, others in NEEDS.items():  # a field that needs others comes after them in this table
        if name in fields and not fields.keys() & set(others):
            left[name] = fields.pop(name)
    return info, fields, left
