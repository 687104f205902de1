"""`generate --from IMAGE`: the settings stored in an image, as if they had been typed, without those to be replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.models.adapter_files import is_in_folder, user_lora_folder
from sdcli.request.replaced import without_named, without_replaced


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
        other = {"guidance_scale", "negative_prompt", "fast"} & {*typed, *replaced}
        if fields.get("negative_prompt") and fields.get("guidance_scale", 2) <= 1 and not other:
            console.note(f"not taken from {image}: its negative prompt, which has no effect at guidance scale 1")
            del fields["negative_prompt"]
    if without is not None:
        fields = without_named(fields, without, typed=typed)
    return without_replaced(fields, replaced)
