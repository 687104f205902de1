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
from sdcli.io.weights import check_fit, fill, read_tensors
from sdcli.models.families import check_single_file, single_file_in
from sdcli.models.families.family import PART_NAMES
from sdcli.models.folder import PartLoader, network_parts
from sdcli.models.networks import build_empty, network_class, text_name
from sdcli.models.recipe import shipped_tokenizer

NAMES = PART_NAMES


def from_single_file(path: Path, dtype: torch.dtype) -> PartLoader:
    """Raises BadWeights and UsageError for a file that is not a whole model of a known family."""
    header = check_header(path)
    check_single_file(path, header)
    found = single_file_in(path)
    assert found is not None
    if found.problem is not None:
        raise found.problem
    family, layout = found.family, found.layout
    configs = layout.configs()
    if found.channels is not None:
        configs["unet"] = {**configs["unet"], "in_channels": found.channels}
    _, components = family.components()

    def network(part: str) -> nn.Module:
        config, prefix = configs[part], layout.prefixes[part]
        number = family.part_dtype(part, config, dtype)
        kind = network_class(config, components[part], family)
        empty = build_empty(kind, config, source=str(path))

        def named(stored: dict[str, Tensor]) -> dict[str, Tensor]:
            """The tensors by the network's names."""
            try:
                if part in layout.convert:
                    return layout.convert[part](stored, config)
                open_clip = part in family.open_clip
                return _from_original_names(part, stored, config, empty, prefix, open_clip=open_clip)
            except (KeyError, IndexError, RuntimeError) as error:
                title = f"that of {layout.title}"
                raise BadWeights(f"{path}: its {NAMES[part]} is not laid out as {title} ({error})") from None

        source = f"{path} ({part})"
        check_fit(empty, named(_shapes(path, header, prefix)), source=source)  # before gigabytes are read
        fill(empty, named(read_tensors(path, number, rename=lambda name: _of(name, prefix))), source=source)
        return kind.finish(empty)

    prediction = stated_prediction(path, header)
    if prediction is None:
        prediction = (layout.prediction or marked_prediction)(path, set(header))
    return PartLoader(
        network_parts(layout.prefixes),
        network,
        tokenizer=lambda part: shipped_tokenizer(family, part),
        identity=lambda part: files_digest([path]),
        scheduler_config={**configs["scheduler"], **prediction},
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


def stated_prediction(path: Path, header: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the metadata of the header say that the UNet was trained to predict; None where they do not say.

    Trainers write `modelspec.prediction_type` (Stability's model specification, kohya's scripts, OneTrainer) or
    `ss_v_parameterization` and `ss_zero_terminal_snr` (kohya's); a tensor `v_pred` counts before both.
    Raises UsageError for a prediction that sdcli does not know.
    """
    metadata = header.get("__metadata__", {})
    if "v_pred" in header:
        return None
    stated = str(metadata.get("modelspec.prediction_type", "")).strip().lower().replace("-", "_")
    v = stated in {"v", "v_prediction", "v_pred", "vpred", "velocity"}
    if stated and not v and stated not in {"epsilon", "eps", "noise"}:
        raise UsageError(f"{path} predicts {stated[:40]!r} (modelspec.prediction_type), which sdcli does not know")
    if not stated and "ss_v_parameterization" in metadata:
        stated, v = "ss", _true(metadata["ss_v_parameterization"])
    if not stated and str(metadata.get("modelspec.architecture", "")).endswith("-v"):  # stable-diffusion-v2-768-v
        stated, v = "architecture", True
    if not stated:
        return None
    zero_snr = "ztsnr" in header or _true(metadata.get("ss_zero_terminal_snr", ""))
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr} if v else {}


def _true(value: Any) -> bool:
    return str(value).strip().lower() in {"true", "1", "yes"}


def _of(name: str, prefix: str) -> str | None:
    return name if name.startswith(prefix) else None


def _shapes(path: Path, header: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Tensors without numbers, of the shapes that the header gives. Raises BadWeights for an impossible one."""
    try:
        return {
            name: torch.empty(entry["shape"], device="meta")
            for name, entry in header.items()
            if name.startswith(prefix) and name != "__metadata__"
        }
    except (RuntimeError, OverflowError) as error:
        raise BadWeights(f"{path} is damaged: a shape in its header is impossible ({error})") from None
