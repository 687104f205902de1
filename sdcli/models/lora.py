"""LoRA files in their three dialects -> a model with them merged into its weights (Hu et al. 2021, arXiv 2106.09685).

    dialect      a layer's name                         its tensors
    kohya        lora_unet_down_blocks_0_..._to_q       .lora_down.weight .lora_up.weight .lora_mid.weight .alpha
    diffusers    unet.down_blocks.0....to_q             .lora_A.weight .lora_B.weight, once .lora.down.weight and .up,
                                                        before that ...attn1.processor.to_q_lora.down.weight
    peft         base_model.model.down_blocks.0....     .lora_A.weight .lora_B.weight, with adapter_config.json
    lycoris      lycoris_down_blocks_0_..._to_q         as of kohya

kohya's names cannot be split again into a path, so all names are compared with their dots as underscores. Those of a
UNet may be of the original code as well (`lora_unet_input_blocks_1_1_...`). diffusers' converter
(loaders/lora_conversion_utils.py) is not used: it raises on lora_mid and on every name it does not know.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdcli.errors import BadWeights, UsageError
from sdcli.io.weight_files import check_header
from sdcli.io.weight_kinds import LORA, kind_of, other_algorithm
from sdcli.io.weights import read_tensors
from sdcli.models.adapter_files import ADAPTER_WEIGHTS, PEFT_PREFIX, adapter_config, find_lora, pinned_lora
from sdcli.models.loaded_model import AppliedLora, LoadedModel
from sdcli.models.lora_config import Scales, read_scales
from sdcli.request.fields import LoraRef, digits

_TENSOR = re.compile(
    r"(?P<layer>.+?)"
    r"(?:[._]lora(?:_linear_layer)?[._](?P<role>down|up|mid|A|B)(?:\.default)?(?:\.weight)?|(?:[._]lora)?\.alpha)"
)
_ROLES = {"A": "down", "B": "up", None: "alpha"}


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one weight: scale * up @ down, up [out, rank], down [rank, in] or [rank, in, height, width]."""

    down: Tensor
    up: Tensor
    scale: float
    """alpha / rank."""

    def fits(self, weight: Tensor) -> bool:
        """Whether it is for a weight of that shape; a 1x1 convolution and a linear layer are the same here."""
        wide = [size for size in self.down.shape[1:] if size != 1]
        return len(self.up) == len(weight) and wide == [size for size in weight.shape[1:] if size != 1]

    def difference(self, weight: Tensor, *, strength: float) -> Tensor:
        """What is added to the weight, of its shape and on its device, in float32."""
        up, down = (tensor.to(weight.device).flatten(1) for tensor in (self.up, self.down))
        return (strength * self.scale) * (up @ down).reshape(weight.shape)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it was read: its layers by the file's own names."""

    dialect: Literal["kohya", "diffusers", "peft"]
    layers: Mapping[str, LoraLayer]
    not_understood: tuple[str, ...]
    """Tensors that belong to no layer."""
    tensors_sha256: str
    origin: str = ""
    """The model that its header names, such as `stable-diffusion-xl-v1-base/lora`."""
    notes: tuple[str, ...] = ()
    """What was not taken over of it, or had to be assumed."""


def with_loras(model: LoadedModel, refs: Sequence[LoraRef], *, folder: Path | None) -> LoadedModel:
    """The model with LoRAs merged in: W + weight * alpha / rank * up @ down, in float32, then in the weight's dtype.

    The given model stays as it is; the new one shares all weights that no LoRA touches. Names are looked up in
    `folder`. Raises NotFound, BadWeights for a file that is damaged or made for other models, and UsageError for a
    weight that has no effect, a kind that is not a LoRA, and a file with another digest than the entry's.
    """
    model.family.refuse("loras", model.spec.name)
    places: dict[str, tuple[str, str]] | None = None
    changes: dict[str, dict[str, list[tuple[float, LoraLayer]]]] = {}
    applied = []
    for ref in refs:
        path = find_lora(ref.path, folder)
        pinned_lora(ref, folder)
        lora = read_lora(path)
        places = _places(model) if places is None else places
        placed = {name: place for name in lora.layers if (place := places.get(_spelled(name))) is not None}
        if not placed:
            raise BadWeights(
                f"{path}: none of its {len(lora.layers)} layers is in {model.spec.name}; "
                f"the LoRA was made for another model family{_origin(lora)}"
            )
        _check_weights(ref, {part for part, _ in placed.values()})
        for name, (part, layer) in placed.items():
            weight = model.parts[part].get_parameter(f"{layer}.weight")
            if not lora.layers[name].fits(weight):
                raise BadWeights(
                    f"{path}: {name} is for a weight of another shape than {model.spec.name} has there, "
                    f"{'x'.join(map(str, weight.shape))}; the LoRA was made for another model family{_origin(lora)}"
                )
            strength = ref.unet_weight if part == "unet" else ref.text_weight
            if strength:
                changes.setdefault(part, {}).setdefault(layer, []).append((strength, lora.layers[name]))
        unmatched = (*(name for name in lora.layers if name not in placed), *lora.not_understood)
        applied.append(AppliedLora(ref, len(placed), unmatched, lora.tensors_sha256, lora.notes))
    merged = {part: _merged(model.parts[part], layers) for part, layers in changes.items()}
    return replace(model, parts={**model.parts, **merged}, loras=tuple(applied))


def read_lora(path: Path) -> LoraFile:
    """A .safetensors file or a PEFT folder. Raises BadWeights, and UsageError for a kind that is not a LoRA."""
    file = path / ADAPTER_WEIGHTS if path.is_dir() else path
    header = check_header(file)
    named, not_understood = _by_layer(file, header)
    metadata = header.get("__metadata__", {})
    scales = read_scales(path, metadata, header)
    if not named:
        kind = kind_of(header)
        if kind is not None and kind is not LORA:
            raise BadWeights(f"{file} holds no LoRA: it is {kind.described(file)}")
        raise BadWeights(f"{file} holds no LoRA: no weights named lora_down and lora_up, or lora_A and lora_B")
    _refuse_the_rest(file, not_understood)
    tensors = read_tensors(file, torch.float32)
    layers = {
        layer: _layer(f"{file}: {layer}", layer, {role: tensors[name] for role, name in roles.items()}, scales)
        for layer, roles in named.items()
    }
    dialect = "peft" if adapter_config(path) is not None else _dialect(named)
    origin = str(metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or "")[:60]
    return LoraFile(dialect, layers, tuple(not_understood), _tensors_sha256(file), origin, scales.notes)


def lora_facts(file: Path) -> dict[str, Any] | None:
    """A description of the LoRA in a file, JSON-ready: dialect, layers by part, ranks. None for a file that holds none.

    Raises BadWeights, and UsageError for a kind that is not a LoRA.
    """
    header = check_header(file)
    named, _ = _by_layer(file, header)
    if not named:
        return None
    text = sum("lora_te" in name or "text_" in name or "encoder.layers." in name for name in named)
    return {
        "dialect": _dialect(named),
        "ranks": sorted({math.prod(header[roles["up"]]["shape"][1:]) for roles in named.values()}),
        "unet_layers": len(named) - text,
        "text_encoder_layers": text,
    }


def _by_layer(file: Path, header: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Each layer's tensors, by their roles (`down`, `up`, `mid`, `alpha`), and the tensors that belong to no layer.

    Raises UsageError for a kind that is not a LoRA.
    """
    layers: dict[str, dict[str, str]] = {}
    not_understood = []
    for name in (name for name in header if name != "__metadata__"):
        if (other := other_algorithm(name)) is not None:
            raise UsageError(f"{file} is {other} ({name}), which sdcli cannot merge; it takes LoRAs")
        match = _TENSOR.fullmatch(name)
        if match is None:
            not_understood.append(name)
        else:
            layers.setdefault(match["layer"], {})[_ROLES.get(match["role"], match["role"])] = name
    for layer in [layer for layer, roles in layers.items() if not roles.keys() >= {"down", "up"}]:
        not_understood += [f"{layer} ({role})" for role in layers.pop(layer)]
    return layers, not_understood


def _refuse_the_rest(file: Path, names: Sequence[str]) -> None:
    """Raise UsageError for what PEFT trains beside a LoRA, which changes the image as much as the LoRA does."""
    for name in names:
        what = next((what for end, what in _BESIDE.items() if name.endswith(end)), None)
        if name.startswith(PEFT_PREFIX) and what is not None:
            raise UsageError(f"{file} holds {what} ({name}) beside its LoRA, which sdcli cannot merge")


_BESIDE = {
    "lora_B.bias": "a bias of the LoRA (lora_bias)",
    ".bias": "trained biases (bias, modules_to_save)",
    "lora_embedding_A": "a LoRA of token embeddings",
    "lora_embedding_B": "a LoRA of token embeddings",
    ".weight": "whole trained modules (modules_to_save)",
}
"""Ends of the names of such tensors -> what they are."""


def _origin(lora: LoraFile) -> str:
    """The end of a sentence about a LoRA for another model."""
    if lora.origin:
        return f" (its header says {lora.origin})"
    if any(name.startswith(("transformer.", "lora_transformer_")) for name in lora.layers):
        return " (its layers are those of a transformer, as of Flux or Stable Diffusion 3)"
    return ""


def _dialect(layers: Mapping[str, Any]) -> Literal["kohya", "diffusers"]:
    return "kohya" if next(iter(layers)).startswith(("lora_", "lycoris_")) else "diffusers"


def _layer(what: str, name: str, tensors: Mapping[str, Tensor], scales: Scales) -> LoraLayer:
    down, up, alpha = tensors["down"], tensors["up"], tensors.get("alpha")
    if down.ndim < 2 or up.ndim < 2 or not down.numel() or not up.numel():
        raise BadWeights(f"{what} is not a pair of matrices")
    if "mid" in tensors:  # a convolution as three: 1x1, one of few channels, 1x1 (LyCORIS calls it Tucker)
        if tensors["mid"].ndim != 4 or tensors["mid"].shape[1] != len(down) or down[0].numel() != down.shape[1]:
            raise BadWeights(f"{what} has a lora_mid that does not fit between its two others")
        down = torch.einsum("ijhw,jc->ichw", tensors["mid"], down.flatten(1))
    if up[0].numel() != len(down):
        raise BadWeights(f"{what} is damaged: its two weights are of the ranks {up[0].numel()} and {len(down)}")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise BadWeights(f"{what} is not finite (NaN)")
    if alpha is not None and alpha.numel() != 1:
        raise BadWeights(f"{what} has an alpha that is not a number")
    # the rank is the number of columns that are multiplied out, also with a lora_mid
    number = None if alpha is None else float(alpha)
    return LoraLayer(down, up, scales.scale(what, name, rank=len(tensors["down"]), alpha=number))


def _check_weights(ref: LoraRef, parts: set[str]) -> None:
    """Raise UsageError for a weight that was given for a part which the LoRA does not change."""
    if ref.unet_weight == ref.text_weight:
        return
    for weight, what, touched in (
        (ref.unet_weight, "UNet", "unet" in parts),
        (ref.text_weight, "text encoder", bool(parts - {"unet"})),
    ):
        if weight and not touched:
            raise UsageError(
                f"{ref.path} has nothing for the {what}, so its own weight of {digits(weight)} there has no effect"
            )


# Where to


def _places(model: LoadedModel) -> dict[str, tuple[str, str]]:
    """Every name that a layer may have in a file, with underscores for dots -> the part and the layer's path in it."""
    places: dict[str, tuple[str, str]] = {}
    for part, prefixes in model.family.lora_prefixes.items():
        network = model.parts.get(part)
        for layer, module in network.named_modules() if network is not None else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for name in _unet_names(network, layer) if part == "unet" else _text_names(layer):
                    for prefix in prefixes:
                        places.setdefault(prefix + name.replace(".", "_"), (part, layer))
    return places


def _spelled(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_")


def _unet_names(unet: Any, layer: str) -> Iterator[str]:
    yield layer
    yield layer.removesuffix(".0")  # to_out.0 is to_out in the oldest files
    if isinstance(unet.config.get("layers_per_block"), int):
        yield original_name(unet, layer)


def original_name(unet: Any, layer: str) -> str:
    """A layer of a UNet whose blocks have equally many layers, by its name in the original code; see `ldm_name`."""
    attended = frozenset(number for number, block in enumerate(unet.up_blocks) if hasattr(block, "attentions"))
    return ldm_name(layer, layers_per_block=unet.config["layers_per_block"], attended=attended)


_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_names(layer: str) -> Iterator[str]:
    """With and without the prefix of older transformers, and as the first text encoder LoRAs of diffusers had them."""
    path = layer.removeprefix("text_model.")
    stem, _, end = path.rpartition(".")
    for name in {path, f"{stem}.{_TEXT_NAMES.get(end, end)}"}:
        yield name
        yield f"text_model.{name}"


_LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_LDM_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def ldm_name(layer: str, *, layers_per_block: int, attended: frozenset[int]) -> str:
    """A layer of diffusers' UNet by its name in the original code (CompVis' latent-diffusion, openaimodel.py).

    There each side is one list: `input_blocks` begins with the first convolution and has a resnet with its attention,
    or a downsampler, an entry; `output_blocks` has an upsampler at the end of the entry before it.
    """
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer)
    if block is not None:
        side, number, kind, position, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        before = (layers_per_block + 1) * number
        entry = f"input_blocks.{before + position + 1}" if side == "down" else f"output_blocks.{before + position}"
        match kind:
            case "resnets":
                return f"{entry}.0.{_LDM_RESNET.get(rest, rest)}"
            case "attentions":
                return f"{entry}.1.{rest}"
            case "downsamplers":
                return f"input_blocks.{before + layers_per_block + 1}.0.op"
            case _:
                return f"output_blocks.{before + layers_per_block}.{2 if number in attended else 1}.{rest}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer)
    if middle is not None:
        entry, rest = f"middle_block.{2 * int(middle[2])}", middle[3]
        return f"{entry}.{_LDM_RESNET.get(rest, rest)}" if middle[1] == "resnets" else f"middle_block.1.{rest}"
    return _LDM_ENDS.get(layer, layer)


# Merging


def _merged(network: nn.Module, changes: Mapping[str, Sequence[tuple[float, LoraLayer]]]) -> nn.Module:
    """A network of its own that shares the weights of the given one, but for those that change."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    changed = copy.deepcopy(network, shared)
    for layer, additions in changes.items():
        module: Any = changed.get_submodule(layer)
        total = module.weight.float()
        for strength, lora in additions:
            total = total + lora.difference(module.weight, strength=strength)
        weight = torch.empty_like(module.weight).copy_(total)  # in the same dtype and memory layout
        module.weight = nn.Parameter(weight, requires_grad=False)
    return changed


def _tensors_sha256(file: Path) -> str:
    """64 hex digits of all that stands behind the header."""
    with open(file, "rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()
