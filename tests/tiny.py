"""Micro models with random weights, made and saved by diffusers and transformers themselves: the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PACKAGE = Path(__file__).parent.parent / "sdcli"


def tiny_parts(*, vae_layers: int = 1, hidden_act: str = "quick_gelu", **unet_changes: Any) -> dict[str, Any]:
    """The parts of a StableDiffusionPipeline in miniature, with seeded weights."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=hidden_act,
    )
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            **unet_changes,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=vae_layers,
        norm_num_groups=4,
        sample_size=64,
    )
    return {
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": CLIPTokenizer.from_pretrained(PACKAGE / "clip_tokenizer"),
        "unet": unet,
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            skip_prk_steps=True,
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }


def save_tiny_pipeline(folder: Path, **changes: Any) -> Path:
    """Write a micro model in the diffusers layout and return its folder."""
    pipeline = StableDiffusionPipeline(**tiny_parts(**changes), requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_sdxl(folder: Path, *, refiner: bool = False, zeros_for_empty: bool = True, **changes: Any) -> Path:
    """Write a micro SDXL (or its refiner, which shares nothing but the latents) and return its folder."""
    torch.manual_seed(1 if refiner else 0)
    shape = {"vocab_size": 49408, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
    second = CLIPTextConfig(**shape, hidden_size=40, hidden_act="gelu", projection_dim=24, eos_token_id=2)
    unet = {
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 40 if refiner else 72,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 8 * (5 if refiner else 6),
    }
    parts = tiny_parts(**{**unet, **changes})
    tokenizer_2 = CLIPTokenizer.from_pretrained(PACKAGE / "clip_tokenizer", pad_token="!")
    parts |= {
        "text_encoder": None if refiner else CLIPTextModel(CLIPTextConfig(**shape, hidden_size=32)),
        "tokenizer": None if refiner else parts["tokenizer"],
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "tokenizer_2": tokenizer_2,
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        "force_zeros_for_empty_prompt": zeros_for_empty,
    }
    del parts["safety_checker"]
    kind = StableDiffusionXLImg2ImgPipeline if refiner else StableDiffusionXLPipeline
    extra = {"requires_aesthetics_score": True} if refiner else {}
    kind(**parts, **extra, add_watermarker=False).save_pretrained(folder, safe_serialization=True)
    return folder
