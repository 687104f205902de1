"""LoRA: low-rank additions to a frozen network (Hu et al. 2021, arXiv 2106.09685), through peft; and its files.

Two files hold the same weights: `pytorch_lora_weights.safetensors` in the format of diffusers and PEFT, and
`lora_kohya.safetensors` in that of kohya's scripts, AUTOMATIC1111's web UI and ComfyUI. In the first alpha / rank is
multiplied into the weights, because diffusers before 0.34 and ComfyUI know no alpha in that format; the second has a
tensor `alpha` for each layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.encoders.clip import stored_name
from sdcli.errors import UsageError
from sdcli.models.families.family import Family
from sdcli.models.lora import original_name
from sdcli.training.state.rows import whole
from sdcli.training.state.state_files import write_tensors

ADAPTER = "default"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraShape:
    """A LoRA's settings: W becomes W + alpha / rank * B A in the layers whose names end in one of `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0


def add_lora(network: nn.Module, shape: LoraShape, *, seed: int) -> None:
    """Freeze a network and add a LoRA, which initially has no effect. Raises UsageError where no layer matches."""
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=list(shape.targets),
        init_lora_weights=True,
    )
    torch.manual_seed(seed)  # peft draws A from the global generator
    try:
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    except ValueError:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        )
        raise UsageError(
            f"no layer of the network matches --lora-targets {' '.join(shape.targets)}; "
            f"its linear layers are called {', '.join(names[:20])}"
        ) from None


def lora_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The LoRA's tensors by PEFT's names: `<layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]."""
    return {
        name.replace(f".{ADAPTER}.", "."): whole(tensor)
        for name, tensor in network.state_dict().items()
        if ".lora_" in name
    }


def merged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights with the LoRA merged into them; the network itself does not change."""
    from peft.tuners.lora import LoraLayer

    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, LoraLayer):
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    return tensors


def write_lora(
    folder: Path, networks: Mapping[str, nn.Module], shapes: Mapping[str, LoraShape], family: Family
) -> None:
    """Write the LoRAs of some networks ("unet", "text_encoder") as one file in each format."""
    peft: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    for part, network in networks.items():
        tensors = lora_tensors(network)
        peft |= to_diffusers(tensors, shapes[part], prefix=family.lora_names[part].diffusers)
        names = family.lora_names[part]
        rename = partial(original_name, network) if names.original else stored_name
        kohya |= to_kohya(tensors, alpha=shapes[part].alpha, prefix=names.kohya, rename=rename)
    write_tensors(
        folder / "pytorch_lora_weights.safetensors",
        peft,
        {"format": "pt", "lora_adapter_metadata": json.dumps(_peft_metadata(shapes, family), sort_keys=True)},
    )
    shape = shapes["unet"]
    write_tensors(
        folder / "lora_kohya.safetensors",
        kohya,
        {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(shape.rank),
            "ss_network_alpha": f"{shape.alpha:g}",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": family.lora_architecture,
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": "LoRA trained by sdcli",
        },
    )


def to_diffusers(tensors: Mapping[str, Tensor], shape: LoraShape, *, prefix: str) -> dict[str, Tensor]:
    """PEFT's names -> diffusers': `unet.<path>.lora_A.weight`, `.lora_B.weight`; the latter with alpha / rank in it."""
    scale = shape.alpha / shape.rank
    return {
        f"{prefix}.{stored_name(name)}": tensor * scale if name.endswith(".lora_B.weight") else tensor
        for name, tensor in tensors.items()
    }


def to_kohya(
    tensors: Mapping[str, Tensor], *, alpha: float, prefix: str, rename: Callable[[str], str] = stored_name
) -> dict[str, Tensor]:
    """PEFT's names -> kohya's: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    `rename` gives the path of a layer in kohya's network.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, kind = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        layer = f"{prefix}_{rename(path).replace('.', '_')}"
        renamed[f"{layer}.lora_{'down' if kind == 'A' else 'up'}.weight"] = tensor
        renamed[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return renamed


def _peft_metadata(shapes: Mapping[str, LoraShape], family: Family) -> dict[str, Any]:
    """The metadata from which diffusers reads rank and alpha, which is the rank: the scale is in the weights."""
    return {
        f"{family.lora_names[part].diffusers}.{key}": value
        for part, shape in shapes.items()
        for key, value in {
            "peft_type": "LORA",
            "r": shape.rank,
            "lora_alpha": shape.rank,
            "lora_dropout": shape.dropout,
            "target_modules": sorted(shape.targets),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
        }.items()
    }
