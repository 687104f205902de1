"""One LoRA with random weights, written in each dialect, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Pairs = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""Part -> layer -> (down, up)."""


def random_pairs(networks: Mapping[str, nn.Module], *, rank: int = 3, seed: int = 0, only: str = "") -> Pairs:
    """Small random matrices for every linear and convolution layer whose path holds `only`."""
    generator = torch.Generator().manual_seed(seed)

    def pair(weight: Any) -> tuple[Tensor, Tensor]:
        ones = (1,) * (weight.ndim - 2)
        down = torch.randn((rank, *weight.shape[1:]), generator=generator) / weight[0].numel() ** 0.5
        return down, torch.randn((len(weight), rank, *ones), generator=generator) * 0.2

    return {
        part: {
            name: pair(module.weight)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and only in name
        }
        for part, network in networks.items()
    }


def save_kohya(path: Path, pairs: Pairs, *, alpha: float | None = None) -> Path:
    tensors = {}
    for part, layers in pairs.items():
        for name, (down, up) in layers.items():
            full = name if part == "unet" else f"text_model.{name}"
            first = "lora_te1" if "text_encoder_2" in pairs else "lora_te"
            prefix = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}[part]
            layer = f"{prefix}_{full.replace('.', '_')}"
            tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
            tensors |= {f"{layer}.alpha": torch.tensor(alpha)} if alpha is not None else {}
    save_file(tensors, path, metadata={"ss_network_dim": "3"})
    return path


def save_diffusers(path: Path, pairs: Pairs, *, alpha: float | None = None) -> Path:
    tensors, config = {}, {}
    for part, layers in pairs.items():
        facts = {"r": 3, "lora_alpha": alpha, "peft_type": "LORA", "target_modules": sorted(layers)}
        config |= {f"{part}.{key}": value for key, value in facts.items()} if alpha is not None else {}
        for name, (down, up) in layers.items():
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)} if config else None)
    return path


def save_peft(folder: Path, pairs: Pairs, *, alpha: float | None = None, **config: Any) -> Path:
    """The way peft itself lays a folder out; see test_lora.py for one that it wrote."""
    folder.mkdir()
    tensors = {}
    for name, (down, up) in next(iter(pairs.values())).items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
