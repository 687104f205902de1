"""Models without a prompt: diffusers' UNet2DModel on pixels (DDPM) or on latents (LDM)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdcli.errors import BadWeights, UsageError
from sdcli.models.families import sd1
from sdcli.models.families.family import Component, Components, Configs, Family, Loaded, ModelKind
from sdcli.vae.config import cell_of

if TYPE_CHECKING:
    from sdcli.encoders.conditioning import Encode

PIXELS: Components = {"unet": Component("unet", ("UNet2DModel",))}
LATENTS: Components = {**PIXELS, "vae": Component("vqvae", sd1.VAE_CLASSES)}
"""LDMPipeline was made for a VQModel, hence its folder's name; diffusers loads an AutoencoderKL there as well."""
PIPELINES = {"DDPMPipeline": PIXELS, "DDIMPipeline": PIXELS, "LDMPipeline": LATENTS}
NO_TEXT = {
    **dict.fromkeys(
        ("prompt_syntax", "clip_skip", "embeddings"), "{name} has no effect with {model}, which has no text encoder"
    ),
    "reuse": "{name}: sdcli has none for {model}, only for the UNets of Stable Diffusion",
    "controls": "{model} takes no captions, and ControlNets are made for models that do",
    "ip_adapters": "{model} takes no captions, and IP-Adapters are made for models that do",
    "train-controlnet": "{model} takes no captions, and ControlNets are made for models that do",
    "tokens": "{model} has no text encoder, so it reads no prompts",
}
DEFAULTS = {"steps": 50, "guidance_scale": 1.0, "scheduler": "ddim"}


def sizes(configs: Configs) -> dict[str, Any]:
    """The fields of ModelKind that the UNet and the VAE decide. Raises BadWeights and UsageError."""
    unet, source = configs.denoiser, configs.source
    widths = unet.get("block_out_channels", (224, 448, 672, 896))  # diffusers' own default
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= 10:
        raise BadWeights(f"{source}: its configuration describes no network: block_out_channels is {str(widths)[:60]}")
    cell = 1 if configs.vae is None else cell_of(configs.vae)
    # UNet2DModel halves its input between its blocks and doubles it again, and joins the two: no half may be odd
    step = cell * 2 ** (len(widths) - 1)
    channels, out = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if configs.vae is None and channels not in (1, 3):
        raise UsageError(f"{source}: its UNet takes {channels} channels; images have 1 (grey) or 3 (RGB)")
    if channels != out:
        raise UsageError(
            f"{source}: its UNet takes {channels} channels and gives {out}, which sdcli cannot generate with"
        )
    if unet.get("class_embed_type") is not None:
        raise UsageError(f"{source}: its UNet takes classes as {unet['class_embed_type']!r}, which sdcli does not know")
    space = "pixel" if configs.vae is None else "latent"
    return {"space": space, "size_step": step, "smallest_size": max(8, step), "cell": cell}


def describe(configs: Configs) -> ModelKind:
    return ModelKind(**sizes(configs), unguided="generates without a prompt")


def encoding(model: Loaded) -> Encode:
    """Nothing to encode."""
    from sdcli.encoders.conditioning import NoEncoding

    return NoEncoding()


UNCONDITIONAL = Family(
    name="unconditional",
    pipelines=PIPELINES,
    defaults=DEFAULTS,
    kind=ModelKind(unguided="generates without a prompt"),
    reads_text=False,
    takes_prompt=False,
    refuses=NO_TEXT,
    claims=lambda denoiser: denoiser.get("num_class_embeds") is None,
    describe=describe,
    encoding=encoding,
)
