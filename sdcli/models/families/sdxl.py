"""Stable Diffusion XL: two text encoders, sizes as conditioning; its refiner has the second text encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdcli.models.families import sd1
from sdcli.models.families.family import (
    Component,
    Components,
    Family,
    Loaded,
    LoraNames,
    PreviewVae,
    SingleFile,
    clip_readers,
    shipped,
)

if TYPE_CHECKING:
    import torch

    from sdcli.encoders.caption_encoder import CaptionEncoder
    from sdcli.encoders.conditioning import Encode

COMPONENTS: Components = {
    **sd1.COMPONENTS,
    "text_encoder_2": Component("text_encoder_2", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": Component("tokenizer_2", sd1.CLIP_TOKENIZERS),
}
ZEROS = "force_zeros_for_empty_prompt"
"""model_index.json: whether an empty negative prompt is all zeros, as the base model was trained."""
LARGE = {"width": 1024, "height": 1024, "guidance_scale": 7.0}
EDM = "{file} was trained on the noise levels of EDM, which sdcli does not know"


def encoding(model: Loaded) -> Encode:
    """Prompts through both text encoders."""
    from sdcli.encoders.conditioning import SdxlEncoding

    parts: Any = model.parts
    unet = parts["unet"].config if "unet" in parts else {}
    return SdxlEncoding(model.spec.name, clip_readers(model), unet=unet, zeros_for_empty=_zeros_for_empty(model))


def caption_encoder(model: Loaded) -> CaptionEncoder:
    """Captions through both text encoders; dropped ones are what `generate` takes for an empty negative prompt."""
    from sdcli.encoders.caption_encoder import CaptionEncoder

    return CaptionEncoder(clip_readers(model), zeros_for_empty=_zeros_for_empty(model))


def _zeros_for_empty(model: Loaded) -> bool:
    return model.settings.get(ZEROS, True) is True


def part_dtype(part: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The VAE overflows in float16 unless its configuration knows better (`force_upcast`), as in diffusers."""
    import torch

    overflows = part == "vae" and config.get("force_upcast", True)
    return torch.float32 if overflows and dtype == torch.float16 else dtype


SDXL = Family(
    name="sdxl",
    preview_vae=PreviewVae("madebyollin/taesdxl", latents=(0.13025, 4)),
    pipelines=dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), COMPONENTS),
    optional=frozenset({"text_encoder", "tokenizer"}),
    takes_refiners=True,
    settings={ZEROS: True},
    refuses={
        "train-controlnet": "{model} is of the sdxl family, for which sdcli trains no ControlNets yet",
        "train-text-encoder": "{model} has two text encoders; train-text-encoder trains models of one",
        "train_text_encoder": "--train-text-encoder: {model} has two text encoders, which train-unet does not train",
    },
    lora_names={"unet": LoraNames("lora_unet", "unet", original=True)},
    lora_architecture="stable-diffusion-xl-v1-base/lora",
    open_clip=frozenset({"text_encoder_2"}),
    single_files=(
        SingleFile(
            "SDXL refiner",
            {**sd1.LDM_PREFIXES, "text_encoder_2": "conditioner.embedders.0.model."},
            marks=("conditioner.embedders.0.model.",),
            configs=shipped("sdxl", "sdxl_refiner"),
            defaults=LARGE,
            settings={ZEROS: False},
        ),
        SingleFile(
            "SDXL",
            {
                **sd1.LDM_PREFIXES,
                "text_encoder": "conditioner.embedders.0.transformer.",
                "text_encoder_2": "conditioner.embedders.1.model.",
            },
            marks=("conditioner.",),
            configs=shipped("sdxl"),
            defaults=LARGE,
        ),
    ),
    refused_files={"edm_mean": EDM, "edm_vpred.": EDM},
    recipes={
        "sdxl": shipped("sdxl"),
        "tiny-sdxl": shipped(
            "sdxl",
            **{
                **sd1.TINY,
                "unet": {
                    **sd1.TINY["unet"],
                    "transformer_layers_per_block": [2, 1],
                    "use_linear_projection": True,
                    "cross_attention_dim": 64,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 32 + 6 * 8,
                },
                "text_encoder_2": {
                    **sd1.TINY["text_encoder"],
                    "hidden_act": "gelu",
                    "eos_token_id": 2,
                    "projection_dim": 32,
                },
            },
        ),
    },
    describe=sd1.describe,
    part_dtype=part_dtype,
    encoding=encoding,
    caption_encoder=caption_encoder,
    is_refiner=lambda model: "text_encoder_2" in model.parts and "text_encoder" not in model.parts,
)
