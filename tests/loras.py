"""One LoRA with random weights, written in each dialect as the tools themselves write it, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ALL_PARTS = ("unet", "text_encoder")

Pairs = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""Part -> layer -> (down, up)."""
Tensors = dict[str, Tensor]


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
    tensors: Tensors = {}
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
    tensors: Tensors = {}
    config: dict[str, Any] = {}
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
    tensors: Tensors = {}
    for name, (down, up) in next(iter(pairs.values())).items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


# The same numbers as other tools name them; each writer gets the names of layers in the original code, too


@dataclass(frozen=True)
class Update:
    """An update of some layers: scale * up @ down, all of one rank."""

    pairs: Pairs
    rank: int
    scale: float
    original: Mapping[str, str]
    """The UNet's layers by their names in the original code."""

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def tensors(self, name: Callable[[str, str], str], down: str, up: str, alpha: str | None = None) -> Tensors:
        """By `name(part, layer)` and the ends of the names."""
        found: Tensors = {}
        for part, layers in self.pairs.items():
            for layer, (a, b) in layers.items():
                found |= {f"{name(part, layer)}{down}": a, f"{name(part, layer)}{up}": b}
                if alpha is not None:
                    found[f"{name(part, layer)}{alpha}"] = torch.tensor(self.alpha)
        return found


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight")


def _flat(prefixes: Mapping[str, str], text: str = "text_model.", names: Mapping[str, str] | None = None) -> Any:
    """Names with underscores for dots."""

    def name(part: str, layer: str) -> str:
        full = text + layer if part.startswith("text") else (names or {}).get(layer, layer)
        return prefixes[part] + full.replace(".", "_")

    return name


def _dotted(prefixes: Mapping[str, str], text: str = "text_model.", names: Mapping[str, str] | None = None) -> Any:
    return lambda part, layer: (
        prefixes[part] + (text + layer if part.startswith("text") else (names or {}).get(layer, layer))
    )


def _saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def _folded(update: Update) -> Update:
    pairs = {
        part: {layer: (down, up * update.scale) for layer, (down, up) in layers.items()}
        for part, layers in update.pairs.items()
    }
    return replace(update, pairs=pairs, scale=1.0)


def _lora_config(update: Update, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": update.rank, "lora_alpha": update.alpha, "target_modules": ["x"], **more}


def kohya(folder: Path, update: Update) -> Path:
    """networks/lora.py of sd-scripts: a tensor alpha for each layer, and figures of the training in the header."""
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": str(update.rank)}
    facts |= {
        "ss_network_alpha": str(update.alpha),
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    names = _flat({"unet": "lora_unet_", "text_encoder": "lora_te_"})
    return _saved(folder / "kohya.safetensors", update.tensors(names, *KOHYA), facts)


def kohya_original(folder: Path, update: Update) -> Path:
    """The same with the names of the original code, as conversions and mergers write them."""
    names = _flat({"unet": "lora_unet_", "text_encoder": "lora_te1_"}, names=update.original)
    return _saved(folder / "original.safetensors", update.tensors(names, *KOHYA))


def onetrainer(folder: Path, update: Update) -> Path:
    """OneTrainer's: kohya's names with alpha, and facts of its own in the header."""
    names = _flat({"unet": "lora_unet_", "text_encoder": "lora_te_"})
    facts = {"ot_branch": "master", "modelspec.prediction_type": "epsilon"}
    return _saved(folder / "onetrainer.safetensors", update.tensors(names, *KOHYA), facts)


def lycoris(folder: Path, update: Update) -> Path:
    """The wrapper of LyCORIS, as SimpleTuner saves it: one prefix for all networks."""
    names = _flat({"unet": "lycoris_", "text_encoder": "lycoris_"})
    return _saved(folder / "lycoris.safetensors", update.tensors(names, *KOHYA))


def comfyui(folder: Path, update: Update) -> Path:
    """ComfyUI's LoraSave: the original names with dots, no alpha."""
    prefixes = {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}
    folded = _folded(update)
    return _saved(folder / "comfy.safetensors", folded.tensors(_dotted(prefixes, names=update.original), *KOHYA[:2]))


def diffusers_now(folder: Path, update: Update) -> Path:
    """diffusers' save_lora_weights since 0.34: LoraConfig of each part in the header."""
    config = {f"{part}.{key}": value for part in update.pairs for key, value in _lora_config(update).items()}
    names = _dotted({"unet": "unet.", "text_encoder": "text_encoder."}, text="")
    facts = {"lora_adapter_metadata": json.dumps(config)}
    return _saved(folder / "diffusers.safetensors", update.tensors(names, *PEFT), facts)


def diffusers_plain(folder: Path, update: Update) -> Path:
    """Before that: no metadata, so the scale is in the weights."""
    names = _dotted({"unet": "unet.", "text_encoder": "text_encoder."})
    return _saved(folder / "plain.safetensors", _folded(update).tensors(names, *PEFT))


def diffusers_old(folder: Path, update: Update) -> Path:
    """diffusers before PEFT: `.lora.down.weight` in the UNet, `.lora_linear_layer.down.weight` in the text encoder."""
    tensors: Tensors = {}
    for part, layers in _folded(update).pairs.items():
        for layer, (down, up) in layers.items():
            stem = f"unet.{layer}.lora" if part == "unet" else f"text_encoder.text_model.{layer}.lora_linear_layer"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return _saved(folder / "old.safetensors", tensors)


def peft_folder(folder: Path, update: Update) -> Path:
    """peft's save_pretrained of one network, with rsLoRA where the rank is even."""
    inside = folder / "peft"
    inside.mkdir(exist_ok=True)
    rs = update.rank % 2 == 0
    config = _lora_config(update, use_rslora=rs, bias="none", use_dora=False, fan_in_fan_out=False, rank_pattern={})
    config |= {"lora_alpha": update.scale * update.rank**0.5} if rs else {}
    (inside / "adapter_config.json").write_text(json.dumps(config))
    names = _dotted(dict.fromkeys(ALL_PARTS, "base_model.model."))
    _saved(inside / "adapter_model.safetensors", update.tensors(names, *PEFT))
    return inside


def peft_file(folder: Path, update: Update) -> Path:
    """The weights in that folder, by their own name."""
    return peft_folder(folder, update) / "adapter_model.safetensors"


def peft_patterns(folder: Path, update: Update) -> Path:
    """The same with its alpha in a pattern for each layer, and another one for all others."""
    inside = peft_folder(folder, update)
    patterns = {f"^{layer}": update.alpha for layers in update.pairs.values() for layer in layers}
    config = _lora_config(update, alpha_pattern=patterns) | {"lora_alpha": 77}
    (inside / "adapter_config.json").write_text(json.dumps(config))
    return inside


DIALECTS: tuple[Callable[[Path, Update], Path], ...] = (
    *(kohya, kohya_original, onetrainer, lycoris, comfyui),
    *(diffusers_now, diffusers_plain, diffusers_old, peft_folder, peft_file, peft_patterns),
)
