"""Stable Diffusion 3: a transformer with flow matching, two CLIP text encoders and perhaps T5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdcli.errors import BadWeights, UsageError
from sdcli.models.families import sdxl
from sdcli.models.families.family import (
    Component,
    Components,
    Configs,
    Family,
    Loaded,
    ModelKind,
    PreviewVae,
    call_transformer,
    clip_readers,
)
from sdcli.vae.config import cell_of

if TYPE_CHECKING:
    from torch import nn

    from sdcli.encoders.conditioning import Encode

COMPONENTS: Components = {
    **sdxl.COMPONENTS,
    "unet": Component("transformer", ("SD3Transformer2DModel",)),
    "text_encoder": Component("text_encoder", ("CLIPTextModelWithProjection",)),
    "text_encoder_3": Component("text_encoder_3", ("T5EncoderModel",)),
    "tokenizer_3": Component("tokenizer_3", ("T5Tokenizer", "T5TokenizerFast")),
}
NOT_YET = "{name}: sdcli has none for {model} yet, which was trained with flow matching"
FOLDER_ONLY = "{file} is a Stable Diffusion 3, which sdcli reads as a diffusers folder, not as a single file"


def describe(configs: Configs) -> ModelKind:
    """The transformer reads latents in patches."""
    config, vae = configs.denoiser, configs.vae or {}
    patch, channels, own = config.get("patch_size", 2), config.get("in_channels", 16), vae.get("latent_channels")
    if type(patch) is not int or not 1 <= patch <= 16:
        raise BadWeights(f"{configs.source}: its transformer cannot have patches of {patch!r} cells")
    if channels != own or config.get("out_channels", 16) not in (channels, None):
        raise UsageError(
            f"{configs.source}: its transformer takes {channels} channels and its VAE makes {own}; they should be equal"
        )
    return ModelKind(size_step=cell_of(vae) * patch, cell=cell_of(vae))


def network(config: dict[str, Any]) -> nn.Module:
    """The transformer of a configuration."""
    from sdcli.io.lean_diffusers import lean_imports

    with lean_imports():
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    if not config.get("pos_embed_max_size"):
        raise ValueError("no pos_embed_max_size")
    transformer: nn.Module = SD3Transformer2DModel.from_config(config)
    return transformer


def encoding(model: Loaded) -> Encode:
    """Prompts through both CLIP text encoders, and T5 if the model has it."""
    from sdcli.encoders.conditioning import Sd3Encoding, T5Reader

    parts: Any = model.parts
    t5 = T5Reader(model.tokenizers["text_encoder_3"], parts["text_encoder_3"]) if "text_encoder_3" in parts else None
    transformer = parts["unet"].config if "unet" in parts else {}
    readers = clip_readers(model)
    return Sd3Encoding(model.spec.name, readers, t5=t5, transformer=transformer, cell=model.spec.kind.cell)


SD3 = Family(
    name="sd3",
    preview_vae=PreviewVae("madebyollin/taesd3", latents=(1.5305, 16)),
    pipelines={"StableDiffusion3Pipeline": COMPONENTS},
    optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    process="flow",
    kind=ModelKind(size_step=16),
    defaults={"width": 1024, "height": 1024, "steps": 28, "guidance_scale": 7.0, "scheduler": "flow-euler"},
    refuses={
        **dict.fromkeys(("refiner", "loras", "controls", "ip_adapters", "embeddings", "pag_scale"), NOT_YET),
        "reuse": "{name}: {model} has a transformer, and only UNets have outermost layers to run alone",
        "train": "{model} is of the sd3 family, which sdcli generates with but does not train yet",
        "noise": "{model} was trained with flow matching, whose noise is not that of diffusion",
    },
    refused_files={"model.diffusion_model.joint_blocks.": FOLDER_ONLY, "joint_blocks.": FOLDER_ONLY},
    open_clip=frozenset({"text_encoder_2"}),
    networks={"SD3Transformer2DModel": network},
    describe=describe,
    encoding=encoding,
    call=call_transformer,
)
