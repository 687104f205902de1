"""The inverse of single-file loading, for tests: diffusers parameter names -> the original LDM names.

The names are those of CompVis' latent-diffusion code, Stability's generative-models and OpenCLIP, for networks with
two layers in each block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_checkpoint(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dicts of the three networks as one original checkpoint."""
    return _whole({**_unet_and_vae(unet, vae), **_named(text, "cond_stage_model.transformer.text_model.")})


def sd2_checkpoint(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same with OpenCLIP's text encoder."""
    return _whole({**_unet_and_vae(unet, vae), **_open_clip(text, "cond_stage_model.model.")})


def sdxl_checkpoint(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    first: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """SDXL as one original checkpoint; its refiner has no first text encoder, and the second stands in its place."""
    parts = _unet_and_vae(unet, vae)
    if first is None:
        return _whole({**parts, **_open_clip(second, "conditioner.embedders.0.model.")})
    parts |= _named(first, "conditioner.embedders.0.transformer.text_model.")
    return _whole({**parts, **_open_clip(second, "conditioner.embedders.1.model.")})


def _whole(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in checkpoint.items()}


def _named(text: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}


def _open_clip(text: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP keeps queries, keys and values in one matrix, and the projection on its other side."""
    checkpoint = {}
    for name, tensor in text.items():
        stored = name.removeprefix("text_model.")
        for ours, theirs in _OPEN_CLIP.items():
            stored = stored.replace(ours, theirs)
        if ".q_proj." in name:
            joined = torch.cat([text[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")])
            checkpoint[stored.replace("q_proj.", "in_proj_")] = joined
        elif name == "text_projection.weight":
            checkpoint["text_projection"] = tensor.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            checkpoint[stored] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in checkpoint.items()}


def _unet_and_vae(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    attended = {name.split(".")[1] for name in unet if name.startswith("up_blocks.") and ".attentions." in name}
    checkpoint = {f"model.diffusion_model.{_unet_name(name, attended)}": tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        attention = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        checkpoint[f"first_stage_model.{_vae_name(name)}"] = tensor[:, :, None, None] if attention else tensor
    return checkpoint


def _unet_name(name: str, attended: Collection[str] = ("1", "2", "3")) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        place = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
        return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"
    if match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name):
        return f"output_blocks.{3 * int(match[1]) + 2}.{2 if match[1] in attended else 1}.{match[2]}"
    if match := re.match(r"mid_block\.resnets\.(\d)\.(.*)", name):
        return f"middle_block.{2 * int(match[1])}.{_resnet(match[2])}"
    return name.replace("mid_block.attentions.0.", "middle_block.1.")


def _resnet(rest: str) -> str:
    part, _, leaf = rest.rpartition(".")
    return f"{_RESNET[part]}.{leaf}"


def _vae_name(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in _ATTENTION.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name
