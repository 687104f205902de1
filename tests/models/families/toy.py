"""A model family in one file: a small transformer with flow matching, packed latents and one CLIP text encoder.

It proves the recipe of CONTRIBUTING.md ("Adding a family"): the tests add it to the table, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from sdcli.errors import UsageError
from sdcli.models.families import sd1
from sdcli.models.families.family import (
    LORA_PREFIXES,
    Component,
    Configs,
    Family,
    LoraNames,
    ModelKind,
    SingleFile,
    shipped,
)
from sdcli.vae.config import cell_of

PATCH = 2
"""Cells a side of what becomes one token."""


class ToyBlock(nn.Module):
    """Attention over the tokens of the text and of the image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        normed = self.norm(tokens)
        context = torch.cat([text, normed], dim=1)
        parts = (self.to_q(normed), self.to_k(context), self.to_v(context))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return tokens + self.to_out[0](attended)


class ToyTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Packed latents [B, L, C], timesteps [B] and text states [B, T, D] -> the velocity [B, L, C]."""

    @register_to_config
    def __init__(self, in_channels: int = 16, width: int = 32, heads: int = 4, layers: int = 2, text_width: int = 32):
        super().__init__()
        self.width = width
        self.embed, self.embed_text = nn.Linear(in_channels, width), nn.Linear(text_width, width)
        self.blocks = nn.ModuleList([ToyBlock(width, heads) for _ in range(layers)])
        self.project = nn.Linear(width, in_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        tokens, length = self.embed(hidden_states), hidden_states.shape[1]
        places = torch.arange(length, device=tokens.device)[None]
        tokens = tokens + self._waves(places.expand(len(tokens), -1)).to(tokens)
        tokens = tokens + self._waves(timestep[:, None].float()).to(tokens)
        text = self.embed_text(encoder_hidden_states)
        for block in self.blocks:
            tokens = block(tokens, text)
        projected: Tensor = self.project(tokens)
        return projected

    def _waves(self, numbers: Tensor) -> Tensor:
        """[B, N] -> [B, N, width]"""
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=numbers.device) * -(math.log(1000) / half))
        angles = numbers[..., None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C]"""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of h x w cells."""
    blocks = tokens.reshape(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def call(network: Callable[..., Any], x: Tensor, t: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    return unpack(network(pack(x), t.expand(len(x)), **arguments), *x.shape[2:])


def timesteps(config: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any]:
    """The noise levels are shifted by the number of tokens, as those of FLUX.1 are."""
    return {"mu": 0.5 + 0.1 * math.log(height * width / PATCH**2)}


def describe(configs: Configs) -> ModelKind:
    vae = configs.vae or {}
    if configs.denoiser.get("in_channels") != vae.get("latent_channels", 4) * PATCH**2:
        raise UsageError(f"{configs.source}: its transformer does not fit its VAE")
    return ModelKind(size_step=cell_of(vae) * PATCH, cell=cell_of(vae))


def without_prefix(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return {name.partition(":")[2]: tensor for name, tensor in tensors.items()}


CONFIGS = shipped(
    "sd1",
    vae=sd1.TINY["vae"],
    text_encoder=sd1.TINY["text_encoder"],
    unet={"in_channels": 16, "width": 32, "heads": 4, "layers": 2, "text_width": 32},
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
)
TOY = Family(
    name="toy",
    pipelines={
        "ToyPipeline": {**sd1.COMPONENTS, "unet": Component("transformer", ("ToyTransformer",))},
    },
    process="flow",
    defaults={"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "scheduler": "flow-euler"},
    kind=ModelKind(size_step=16),
    refuses={"pag_scale": "{name}: {model} has no layers that could be perturbed"},
    single_files=(
        SingleFile(
            "a toy",
            {"unet": "toy:", "vae": "toy_vae:", "text_encoder": "toy_text:"},
            CONFIGS,
            marks=("toy:",),
            defaults={"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "scheduler": "flow-euler"},
            convert=dict.fromkeys(("unet", "vae", "text_encoder"), without_prefix),
        ),
    ),
    recipes={"toy": CONFIGS},
    networks={"ToyTransformer": ToyTransformer.from_config},
    lora_prefixes={**LORA_PREFIXES, "unet": (*LORA_PREFIXES["unet"], "transformer_")},
    lora_names={
        "unet": LoraNames("lora_unet", "transformer"),
        "text_encoder": LoraNames("lora_te", "text_encoder"),
    },
    lora_architecture="toy/lora",
    describe=describe,
    call=call,
    timesteps=timesteps,
    text_width=lambda denoiser: denoiser.get("text_width"),
)
