"""Stable Diffusion 2.x: the UNet of 1.x with OpenCLIP's text encoder, some of its models with v-prediction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdcli.models.families import sd1
from sdcli.models.families.family import Family, SingleFile, shipped

BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def prediction(file: Path, names: Collection[str]) -> Mapping[str, Any]:
    """v-prediction is not marked in these files, but one bias has a wider spread there (ComfyUI's observation)."""
    if BIAS not in names:
        return {}
    import torch

    from sdcli.io.weights import read_tensors

    (values,) = read_tensors(file, torch.float32, rename=lambda name: name if name == BIAS else None).values()
    wide = bool(values.std(correction=0) > 0.09)
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names} if wide else {}


SD2 = Family(
    name="sd2",
    preview_vae=sd1.SD1.preview_vae,
    pipelines=dict.fromkeys(sd1.PIPELINES, sd1.COMPONENTS),
    index=sd1.SD1.index,
    open_clip=frozenset({"text_encoder"}),
    single_files=(
        SingleFile(
            "SD 2.x",
            {**sd1.LDM_PREFIXES, "text_encoder": "cond_stage_model.model."},
            marks=("cond_stage_model.model.",),
            configs=shipped("sd1", "sd2"),
            prediction=prediction,
        ),
    ),
    describe=sd1.describe,
    scheduler_config=sd1.mended,
)
