"""The CLIP text encoders of a model as one network: what training and its cache read of captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdcli.encoders.clip import ProjectedClipTextEncoder
from sdcli.encoders.conditioning import ClipReader
from sdcli.encoders.tokenizer import ClipTokenizer

HIDDEN, POOLED = "hidden", "pooled"
"""The names of a caption's tensors; only models with a projected text encoder have the second."""


class CaptionEncoder(nn.Module):
    """Captions as one chunk each, as `generate` encodes them with `--prompt-syntax plain` and its default clip skip.

    A single text encoder gives its last hidden states. Of several, as SDXL has them (Podell et al. 2023, arXiv
    2307.01952, section 2.1), the states of the penultimate layers are side by side, with the embedding of the text.
    """

    def __init__(self, readers: Sequence[ClipReader], *, zeros_for_empty: bool = False) -> None:
        """With `zeros_for_empty` all numbers of the empty caption are zero."""
        super().__init__()
        self.tokenizers = tuple(reader.tokenizer for reader in readers)
        self.networks = nn.ModuleList(reader.network for reader in readers)
        self.zeros_for_empty = zeros_for_empty

    @property
    def readers(self) -> list[ClipReader]:
        """Each text encoder with its tokenizer."""
        return [ClipReader(*pair) for pair in zip(self.tokenizers, self.networks, strict=True)]  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """How many numbers the hidden state of a token is."""
        return sum(reader.network.config.hidden_size for reader in self.readers)

    @property
    def numbers(self) -> int:
        """How many numbers the hidden states of a caption are."""
        return int(self.readers[0].network.config.max_position_embeddings) * self.width

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids [B, encoders, L] of `token_ids` -> `hidden` [B, L, D] and, of several encoders, `pooled` [B, P]."""
        if len(self.networks) == 1:
            return {HIDDEN: self.networks[0](ids[:, 0])}
        states, pooled = [], []
        for reader, own in zip(self.readers, ids.unbind(1), strict=True):
            layers = reader.network.hidden_states(own)
            states.append(layers[-2])
            if isinstance(reader.network, ProjectedClipTextEncoder):
                pooled.append(reader.network.pooled(layers[-1], own))
        encoded = {HIDDEN: torch.cat(states, dim=-1), POOLED: torch.cat(pooled, dim=-1)}
        if self.zeros_for_empty:
            empty = (ids == token_ids(self.tokenizers, "").to(ids)).flatten(1).all(dim=1)
            encoded[HIDDEN] = encoded[HIDDEN].masked_fill(empty[:, None, None], 0)
            encoded[POOLED] = encoded[POOLED].masked_fill(empty[:, None], 0)
        return encoded


def token_ids(tokenizers: Sequence[ClipTokenizer], caption: str) -> Tensor:
    """A caption's token ids for each text encoder, int64 [encoders, L]; what is too long is cut."""
    return torch.tensor([tokenizer(caption).ids for tokenizer in tokenizers])
