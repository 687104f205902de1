"""Stable Diffusion 1.x and the models that share its architecture, such as the embedded one."""

from __future__ import annotations

from typing import Any

from sdcli.errors import UsageError
from sdcli.models.families.family import (
    Component,
    Components,
    Configs,
    Family,
    ModelKind,
    PreviewVae,
    SingleFile,
    shipped,
)
from sdcli.vae.config import cell_of

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
INPAINTING_CHANNELS = 5
"""The mask and the masked image's latents, after those that are denoised."""

OTHER_CHANNELS = {1: ", as of a depth2img model", 3: ", as of an upscaler", 4: ", as of an InstructPix2Pix model"}
"""Further channels of models that sdcli cannot generate with."""

COMPONENTS: Components = {
    "unet": Component("unet", ("UNet2DConditionModel",)),
    "vae": Component("vae", VAE_CLASSES),
    "text_encoder": Component("text_encoder", ("CLIPTextModel",)),
    "tokenizer": Component("tokenizer", CLIP_TOKENIZERS),
}
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
LDM_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}

TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def describe(configs: Configs) -> ModelKind:
    """A UNet that reads text, on latents; its channels are the VAE's, or those of an inpainting model."""
    cell = 1 if configs.vae is None else cell_of(configs.vae)
    own = 4 if configs.vae is None else configs.vae.get("latent_channels", 4)
    channels = configs.denoiser.get("in_channels", 4)
    if channels not in (own, own + INPAINTING_CHANNELS):
        special = OTHER_CHANNELS.get(channels - own if type(channels) is int else 0, "")
        raise UsageError(
            f"{configs.source}: its UNet takes {channels} channels{special}; sdcli generates with those of the VAE "
            f"({own}), or with {INPAINTING_CHANNELS} more of an inpainting model"
        )
    return ModelKind(size_step=cell, inpaints=channels != own, cell=cell)


def mended(scheduler: dict[str, Any]) -> dict[str, Any]:
    """Old folders lack two settings that the models were trained with; diffusers' pipeline sets them as well."""
    return {**scheduler, "steps_offset": 1, "clip_sample": False}


SD1 = Family(
    name="sd1",
    preview_vae=PreviewVae("madebyollin/taesd", latents=(0.18215, 4)),
    pipelines=dict.fromkeys(PIPELINES, COMPONENTS),
    index={
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
    single_files=(
        SingleFile("SD 1.x", {**LDM_PREFIXES, "text_encoder": "cond_stage_model.transformer."}, configs=shipped("sd1")),
    ),
    recipes={"sd15": shipped("sd1"), "tiny": shipped("sd1", **TINY)},
    describe=describe,
    scheduler_config=mended,
)
