"""Single-file checkpoints: the parts of one file, with the original code's tensor names changed to diffusers'."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.errors import BadWeights, UsageError
from sdcli.io.lean_diffusers import lean_imports
from sdcli.io.weight_files import check_header, files_digest
from sdcli.io.weights import fill, read_tensors
from sdcli.models.families import FAMILIES, single_file_of
from sdcli.models.families.family import SingleFile
from sdcli.models.folder import PartLoader, network_parts
from sdcli.models.networks import build_empty, network_class, text_name
from sdcli.models.recipe import shipped_tokenizer

NAMES: dict[str, str] = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
    "unet": "UNet",
    "vae": "VAE",
}
"""What error messages call the parts."""


def from_single_file(path: Path, dtype: torch.dtype) -> PartLoader:
    """Raises BadWeights and UsageError for a file that is not a whole model of a known family."""
    names = set(check_header(path)) - {"__metadata__"}
    family, layout = single_file_of(names)
    _check_names(path, names, layout)
    configs = layout.configs()
    _, components = family.components()

    def network(part: str) -> nn.Module:
        config, prefix = configs[part], layout.prefixes[part]
        number = family.part_dtype(part, config, dtype)
        stored = read_tensors(path, number, rename=lambda name: name if name.startswith(prefix) else None)
        kind = network_class(config, components[part], family)
        empty = build_empty(kind, config, source=str(path))
        try:
            if part in layout.convert:
                tensors = layout.convert[part](stored, config)
            else:
                tensors = _from_original_names(part, stored, config, empty, prefix, open_clip=part in family.open_clip)
        except (KeyError, IndexError, RuntimeError) as error:
            raise BadWeights(f"{path}: its {NAMES[part]} is not laid out as that of {layout.title} ({error})") from None
        fill(empty, tensors, source=f"{path} ({part})")
        return kind.finish(empty)

    prediction = layout.prediction or marked_prediction
    return PartLoader(
        network_parts(layout.prefixes),
        network,
        tokenizer=lambda part: shipped_tokenizer(family, part),
        identity=lambda part: files_digest([path]),
        scheduler_config={**configs["scheduler"], **prediction(path, names)},
        settings=layout.settings,
    )


def _from_original_names(
    part: str, stored: dict[str, Tensor], config: dict[str, Any], empty: nn.Module, prefix: str, *, open_clip: bool
) -> dict[str, Tensor]:
    """Tensors named as by the original code (CompVis/stable-diffusion) -> as in diffusers."""
    with lean_imports():
        from diffusers.loaders import single_file_utils as ldm

    tensors: dict[str, Tensor]
    if part == "unet":
        tensors = ldm.convert_ldm_unet_checkpoint(stored, config)
        return tensors
    if part == "vae":
        tensors = ldm.convert_ldm_vae_checkpoint(stored, config)
        return tensors
    if open_clip:
        tensors = ldm.convert_open_clip_checkpoint(empty, stored, prefix=prefix)
    else:
        tensors = ldm.convert_ldm_clip_checkpoint(stored)
    renamed = ((text_name(name, set()), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in renamed if name is not None}


def marked_prediction(path: Path, names: Collection[str]) -> Mapping[str, Any]:
    """What the UNet was trained to predict, if it is not the noise: files of v-prediction have marks."""
    v = "v_pred" in names
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names} if v else {}


def _check_names(path: Path, names: set[str], layout: SingleFile) -> None:
    """Tell apart the files that people confuse with a checkpoint, each with its own sentence."""

    def some(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if some("lora_unet_", "lora_te") or any(".lora_A." in name or ".lora.down." in name for name in names):
        raise BadWeights(f"{path} is a LoRA, not a whole model; generate with it by --lora {path}")
    for family in FAMILIES.values():
        for start, sentence in family.refused_files.items():
            if some(start):
                raise UsageError(sentence.format(file=path))
    if some("down_blocks.", "decoder.up_blocks.", "text_model.", "encoder.layers."):
        raise BadWeights(f"{path} is one part of a diffusers model; give the folder that holds model_index.json")
    for part, prefix in layout.prefixes.items():
        if not some(prefix):
            missing = f"{NAMES[part]} (no weights named {prefix}*)"
            raise BadWeights(f"{path} has no {missing}; it is not a whole {layout.title} checkpoint")
