"""The T5 text encoder of Stable Diffusion 3: transformers' network, and its tokenizer read without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from sdcli.errors import BadWeights, NotFound, first_line
from sdcli.io.lean_diffusers import full_imports
from sdcli.io.stand_ins import stand_in

LENGTH = 256
"""Tokens that the encoder reads; diffusers' `max_sequence_length`."""


@dataclass(frozen=True)
class T5Tokenizer:
    """Text -> exactly LENGTH token ids: the words, the end, padding."""

    tokenizer: Tokenizer

    def __call__(self, text: str) -> list[int]:
        """A longer text is cut before the end token."""
        return list(self.tokenizer.encode(text).ids)


def load_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Read tokenizer.json. Raises NotFound and BadWeights."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise NotFound(f"no file {file}; the tokenizer needs it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        padding = tokenizer.token_to_id("<pad>")
        if padding is None:
            raise ValueError("it has no <pad>")
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH, pad_id=padding, pad_token="<pad>")
    except Exception as error:  # the library raises bare Exception for a bad file
        raise BadWeights(stand_in(file) or f"{folder} holds no usable T5 tokenizer: {error}") from None
    return T5Tokenizer(tokenizer)


def empty_t5(config: dict[str, Any]) -> nn.Module:
    """The network of a config.json. Raises ValueError for one that describes none."""
    with full_imports():
        from transformers import T5Config, T5EncoderModel  # 2 s, so it waits until a model has one

    try:
        return T5EncoderModel(T5Config.from_dict(config))
    except Exception as error:  # transformers fails in a dozen ways on strange configurations
        raise ValueError(first_line(error)) from None


def spare_float16(network: nn.Module) -> nn.Module:
    """The layers whose sums overflow in float16 in float32, as transformers has them there."""
    for name, module in network.named_modules():
        if name.endswith(".wo") and next(module.parameters()).dtype == torch.float16:
            module.float()
    return network
