"""The classes of networks that model folders name: how each is built, and how its weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdcli.encoders.clip import ACTIVATIONS, ClipTextConfig, ClipTextEncoder, ProjectedClipTextEncoder
from sdcli.encoders.t5 import empty_t5, load_t5_tokenizer, spare_float16
from sdcli.encoders.tokenizer import load_tokenizer
from sdcli.errors import UsageError
from sdcli.io.devices import cpu_has_bfloat16_kernels
from sdcli.io.lean_diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNet2DModel
from sdcli.io.weights import N, empty_network
from sdcli.models.families.family import Component, Family


@dataclass(frozen=True)
class NetworkClass:
    """How networks of one class are made from a folder."""

    build: Callable[[dict[str, Any]], nn.Module]
    """config.json -> the network; raises ValueError or the like for a configuration that describes none."""
    stem: str = "diffusion_pytorch_model"
    """What the names of its weight files begin with."""
    present_name: Callable[[str, set[str]], str | None] = lambda stored, wanted: stored
    """(name in the file, names of the network) -> the present name of a parameter; None if it is not one."""
    complete: Callable[[dict[str, Tensor]], None] = lambda tensors: None
    """Add the parameters that files have under another name."""
    finish: Callable[[nn.Module], nn.Module] = lambda network: network


def network_class(config: Mapping[str, Any], component: Component, family: Family) -> NetworkClass:
    """The class that a configuration names, or the usual one of its component. Raises UsageError for another class."""
    name = config.get("_class_name", component.classes[0])
    if name in family.networks:
        return NetworkClass(family.networks[name])
    if name not in NETWORKS or name not in component.classes:
        raise UsageError(f"unknown class {name!r}; known: {', '.join(component.classes)}")
    return NETWORKS[name]


def build_empty(kind: NetworkClass, config: dict[str, Any], *, source: str) -> nn.Module:
    """A network without weights. Raises BadWeights and UsageError, whose sentences begin with `source`."""
    if config.get("latents_mean") is not None:
        raise UsageError(f"{source}: its latents have a mean of their own, which sdcli does not know")
    return empty_network(lambda: kind.build(config), source=source)


def placed(network: N, device: torch.device) -> N:
    """On the device; convolutions channels-last in half precision, where it is quicker (float32 stays bit-exact)."""
    network = network.to(device)
    if next(network.parameters()).dtype == torch.float32:
        return network
    if device.type == "cpu" and not cpu_has_bfloat16_kernels():
        use_float32_kernels(network)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def use_float32_kernels(network: nn.Module) -> None:
    """Let the convolutions and linear layers of a bfloat16 network compute in float32 and return bfloat16.

    For CPUs for which oneDNN has no bfloat16 kernels. The weights stay in bfloat16; a layer's are cast whenever it
    computes.
    """
    for module in network.modules():
        if type(module) in _IN_FLOAT32:
            module.__class__ = _IN_FLOAT32[type(module)]


class _Float32Conv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input.float(), weight.float(), _float32(bias)).to(input.dtype)


class _Float32Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input.float(), self.weight.float(), _float32(self.bias)).to(input.dtype)


_IN_FLOAT32: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Float32Conv2d, nn.Linear: _Float32Linear}


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def tokenizer_in(folder: Path, component: Component) -> Any:
    """The tokenizer of a folder. Raises NotFound and BadWeights."""
    return (load_t5_tokenizer if component.classes[0].startswith("T5") else load_tokenizer)(folder)


# The classes


def _text_config(config: dict[str, Any]) -> ClipTextConfig:
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {config['hidden_act']!r}")
    return ClipTextConfig.from_dict(config)


def _projected(config: dict[str, Any]) -> nn.Module:
    return ProjectedClipTextEncoder(_text_config(config), projection_dim=config.get("projection_dim", 512))


def text_name(stored: str, wanted: set[str]) -> str | None:
    """Older transformers have a prefix, and store a list of positions, which is not a weight."""
    return None if stored.endswith("position_ids") else stored.removeprefix("text_model.")


_OLD_ATTENTION = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


def _vae_name(stored: str, wanted: set[str]) -> str:
    """Older diffusers call the layers of the VAE's attention otherwise."""
    if stored not in wanted:
        for old, new in _OLD_ATTENTION:
            if old in stored and stored.replace(old, new) in wanted:
                return stored.replace(old, new)
    return stored


def _tie_embeddings(tensors: dict[str, Tensor]) -> None:
    """T5's one matrix of embeddings has two names and is stored once."""
    if "shared.weight" in tensors:
        tensors.setdefault("encoder.embed_tokens.weight", tensors["shared.weight"])


NETWORKS: dict[str, NetworkClass] = {
    "UNet2DConditionModel": NetworkClass(UNet2DConditionModel.from_config),
    "UNet2DModel": NetworkClass(UNet2DModel.from_config),
    "AutoencoderKL": NetworkClass(AutoencoderKL.from_config, present_name=_vae_name),
    "AutoencoderTiny": NetworkClass(AutoencoderTiny.from_config),
    "CLIPTextModel": NetworkClass(
        lambda config: ClipTextEncoder(_text_config(config)), stem="model", present_name=text_name
    ),
    "CLIPTextModelWithProjection": NetworkClass(_projected, stem="model", present_name=text_name),
    "T5EncoderModel": NetworkClass(
        empty_t5, stem="model", present_name=text_name, complete=_tie_embeddings, finish=spare_float16
    ),
}
"""diffusers' classes by their names in config.json; the CLIP text encoders are our own."""
