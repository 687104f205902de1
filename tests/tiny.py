"""Micro models with random weights, made and saved by diffusers and transformers themselves: the oracles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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
        "tokenizer": CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer"),
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


def save_tiny_controlnet(folder: Path, model: Path, *, seed: int = 1, **changes: Any) -> Path:
    """Write a ControlNet for the UNet of a micro model, with random weights where a new one has zeros."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(unet)
    if changes:
        controlnet = ControlNetModel.from_config({**controlnet.config, **changes})
    for name, parameter in controlnet.named_parameters():
        if not parameter.any():  # the map counts for much, so that parity with another map would be seen
            torch.nn.init.normal_(parameter, std=10 if name.endswith("conv_out.weight") else 0.1)
    controlnet.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_ip_adapter(
    folder: Path, model: Path, *, kind: str = "plain", seed: int = 1, dtype: torch.dtype = torch.float32
) -> Path:
    """Write an IP-Adapter for the UNet of a micro model, and `image_encoder` beside it; return the adapter's file.

    Its kinds have the layouts of h94/IP-Adapter: ip-adapter_sd15, ip-adapter-plus_sd15, ip-adapter-full-face_sd15.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    width, seen, whole = unet.config.cross_attention_dim, 32, 24
    shapes = {
        "plain": {"proj.weight": (4 * width, whole), "proj.bias": (4 * width,), "norm.weight": (width,)},
        "full": {
            **{"proj.0.weight": (seen, seen), "proj.0.bias": (seen,), "proj.2.weight": (width, seen)},
            **{"proj.2.bias": (width,), "proj.3.weight": (width,), "proj.3.bias": (width,)},
        },
        "plus": {
            **{"latents": (1, 5, 16), "proj_in.weight": (16, seen), "proj_in.bias": (16,)},
            **{"proj_out.weight": (width, 16), "proj_out.bias": (width,)},
            **{"norm_out.weight": (width,), "norm_out.bias": (width,)},
            **{
                f"layers.{n}.{name}.weight": shape
                for n in range(4)
                for name, shape in {
                    **{"0.norm1": (16,), "0.norm2": (16,), "0.to_q": (64, 16), "0.to_kv": (128, 16)},
                    **{"0.to_out": (16, 64), "1.0": (16,), "1.1": (64, 16), "1.3": (16, 64)},
                }.items()
            },
            **{f"layers.{n}.{name}.bias": (16,) for n in range(4) for name in ("0.norm1", "0.norm2", "1.0")},
        },
    }[kind]
    shapes |= {"norm.bias": (width,)} if kind == "plain" else {}
    tensors = {f"image_proj.{name}": torch.randn(shape) for name, shape in shapes.items()}
    layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    for n, layer in enumerate(layers):
        for role in ("to_k", "to_v"):
            tensors[f"ip_adapter.{2 * n + 1}.{role}_ip.weight"] = torch.randn(getattr(layer, role).weight.shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / f"{kind}.safetensors")
    vision = CLIPVisionConfig(
        **{"hidden_size": seen, "intermediate_size": 37, "projection_dim": whole, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)  # one encoder for all that stand beside each other
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    return folder / f"{kind}.safetensors"


def save_tiny_pipeline(folder: Path, **changes: Any) -> Path:
    """Write a micro model in the diffusers layout and return its folder."""
    reference = StableDiffusionPipeline(**tiny_parts(**changes), requires_safety_checker=False)
    reference.save_pretrained(folder, safe_serialization=True)
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
    tokenizer_2 = CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer", pad_token="!")
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


def save_tiny_sd3(folder: Path, *, t5: bool = True, **changes: Any) -> Path:
    """Write a micro Stable Diffusion 3 (one layer as of 3.5), with or without its T5, and return its folder."""
    torch.manual_seed(0)
    shape = {"vocab_size": 49408, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
    clip_l = CLIPTextConfig(**shape, hidden_size=16, hidden_act="quick_gelu", projection_dim=16, eos_token_id=2)
    clip_g = CLIPTextConfig(**shape, hidden_size=20, hidden_act="gelu", projection_dim=24, eos_token_id=2)
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 40,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **changes,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip_l),
        tokenizer=CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection(clip_g),
        tokenizer_2=CLIPTokenizer.from_pretrained(PACKAGE / "encoders/clip_tokenizer", pad_token="!"),
        text_encoder_3=T5EncoderModel(tiny_t5()) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_t5() -> T5Config:
    """As of T5 1.1, whose first version SD 3 has."""
    return T5Config(
        vocab_size=40,
        d_model=48,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A vocabulary of letters."""
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.()"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def with_parts(model: Any, *, identity: str = "memory", **networks: nn.Module) -> Any:
    """A LoadedModel with some networks replaced; `identity` is what records call their weights."""
    from sdcli.io.weight_files import finished

    identities = {**model.identities, **dict.fromkeys(networks, finished(identity))}
    return replace(model, parts={**model.parts, **networks}, identities=identities)
