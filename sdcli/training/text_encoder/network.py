"""The text encoder to train: a new one with random weights or a copy of a model's, and its files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.encoders.clip import ACTIVATIONS, ClipTextConfig, ClipTextEncoder, ProjectedClipTextEncoder, stored_name
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import UsageError
from sdcli.io import rng
from sdcli.io.json_files import read_json_object
from sdcli.io.temporary_files import temporary_path
from sdcli.io.weight_files import MAX_HEADER_BYTES, check_header
from sdcli.io.weights import empty_network, fill
from sdcli.request.schema import did_you_mean
from sdcli.training.state.state_files import write_tensors


def fit_config(config: ClipTextConfig, tokenizer: ClipTokenizer) -> ClipTextConfig:
    """A network's shape with the vocabulary and length of a tokenizer. Raises UsageError for an impossible shape."""
    if config.hidden_act not in ACTIVATIONS:
        raise UsageError(f"no activation {config.hidden_act!r}{did_you_mean(config.hidden_act, ACTIVATIONS)}")
    if min(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) < 1:
        raise UsageError("the text encoder needs at least one layer, one head and one channel")
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"{config.hidden_size} channels cannot be divided evenly among {config.num_attention_heads} attention heads"
        )
    size = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return dataclasses.replace(
        config,
        vocab_size=size,
        max_position_embeddings=tokenizer.max_length,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )


def new_text_encoder(config: ClipTextConfig, tokenizer: ClipTokenizer, *, seed: int) -> ClipTextEncoder:
    """A network with random weights in float32 for a tokenizer's vocabulary. Raises UsageError.

    The standard deviations are CLIP's (transformers' CLIPPreTrainedModel._init_weights; Radford et al. 2019,
    section 2.3, for the residual layers); biases are 0 and norms 1.
    """
    network = _empty(fit_config(config, tokenizer))
    narrow = config.hidden_size**-0.5
    residual = narrow * (2 * config.num_hidden_layers) ** -0.5
    deviations = {
        "embedding.weight": 0.02,
        "q_proj.weight": residual,
        "k_proj.weight": residual,
        "v_proj.weight": residual,
        "out_proj.weight": narrow,
        "fc1.weight": (2 * config.hidden_size) ** -0.5,
        "fc2.weight": residual,
    }
    tensors = {}
    for name, empty in network.state_dict().items():
        deviation = next((value for suffix, value in deviations.items() if name.endswith(suffix)), None)
        if deviation is None:
            tensors[name] = torch.full(empty.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            tensors[name] = rng.noise(seed, 0, f"weights of {name}", empty.shape) * deviation
    return _filled(network, tensors)


def copy_text_encoder(encoder: ClipTextEncoder, tokenizer: ClipTokenizer) -> ClipTextEncoder:
    """A trainable float32 copy of a loaded text encoder. Raises UsageError where the tokenizer does not fit."""
    own, expected = encoder.config, fit_config(encoder.config, tokenizer)
    if expected.vocab_size > own.vocab_size or expected.max_position_embeddings > own.max_position_embeddings:
        raise UsageError(
            f"the text encoder has {own.vocab_size} tokens and {own.max_position_embeddings} positions, "
            f"its tokenizer gives {expected.vocab_size} and {expected.max_position_embeddings}"
        )
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in encoder.state_dict().items()}
    # The special tokens' ids are the tokenizer's: the files of SD 1.x have others in their config.json.
    config = dataclasses.replace(
        expected, vocab_size=own.vocab_size, max_position_embeddings=own.max_position_embeddings
    )
    return _filled(_empty(config), tensors)


def new_projection(width: int, teacher_width: int, *, seed: int) -> nn.Module:
    """A linear layer without bias from the encoder's width to the teacher's, initialised as CLIP's text projection."""
    source = "text_projection"
    layer = empty_network(lambda: nn.Linear(width, teacher_width, bias=False), source=source)
    weight = rng.noise(seed, 0, f"weights of {source}", (teacher_width, width)) * width**-0.5
    fill(layer, {"weight": weight}, source=source)
    return layer.requires_grad_(True).train()


def first_end(token_ids: Tensor, end_id: int) -> Tensor:
    """The position [...] of the first end token of each text [..., L]; later end tokens are padding."""
    return (token_ids == end_id).int().argmax(dim=-1)


def write_text_encoder(folder: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, in float32, in the layout of transformers' CLIP text encoders.

    The weights' names have the prefix that older transformers need, and newer ones read as well. `network` is a
    ClipTextEncoder; `tensors` are its weights, or others of the same names. Meant for the inside of a checkpoint: the
    files are not written atomically.
    """
    assert isinstance(network, ClipTextEncoder)
    width = network.config.hidden_size
    if isinstance(network, ProjectedClipTextEncoder):
        width = len(network.text_projection.weight)
    config = {
        "architectures": [text_encoder_class(network)],
        "model_type": "clip_text_model",
        **dataclasses.asdict(network.config),
        "projection_dim": width,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
    stored = {stored_name(name): tensor.detach().float() for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def text_encoder_class(network: ClipTextEncoder) -> str:
    """Its class in transformers, which model_index.json and config.json name."""
    return "CLIPTextModelWithProjection" if isinstance(network, ProjectedClipTextEncoder) else "CLIPTextModel"


def use_stored_names(folder: Path) -> None:
    """Give the weights of a copied text encoder the names that transformers of any age loads; the numbers stay."""
    for file in sorted(folder.glob("*.safetensors")):
        header = check_header(file)
        renamed = {stored_name(name): entry for name, entry in header.items()}
        if renamed.keys() != header.keys():
            _replace_header(file, renamed)
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        content = read_json_object(index, max_bytes=MAX_HEADER_BYTES)
        names = {stored_name(name): shard for name, shard in content.get("weight_map", {}).items()}
        index.write_text(json.dumps({**content, "weight_map": names}, indent=2) + "\n", encoding="utf-8")


def _replace_header(file: Path, header: Mapping[str, Any]) -> None:
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    temporary = temporary_path(file.parent, file.name)
    with open(file, "rb") as old, open(temporary, "wb") as new:
        old.seek(8 + int.from_bytes(old.read(8), "little"))
        new.write(len(raw).to_bytes(8, "little") + raw)
        shutil.copyfileobj(old, new, 2**20)
    shutil.copymode(file, temporary)
    os.replace(temporary, file)


def _empty(config: ClipTextConfig) -> ClipTextEncoder:
    return empty_network(lambda: ClipTextEncoder(config), source="the text encoder")


def _filled(network: ClipTextEncoder, tensors: Mapping[str, Tensor]) -> ClipTextEncoder:
    fill(network, tensors, source="the text encoder")
    return network.requires_grad_(True).train()
