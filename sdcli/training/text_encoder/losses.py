"""The parts of text encoder losses: InfoNCE, and which tokens of two texts match."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sdcli.training.text_encoder.network import first_end


def info_nce(rows: Tensor, columns: Tensor, *, alike: Tensor, temperature: float) -> Tensor:
    """InfoNCE per row [B], in both directions, of unit vectors [B, D] where row i belongs to column i.

    -log softmax(rows · columnsᵀ / temperature) on the diagonal (van den Oord et al. 2018; in both directions as CLIP's,
    Radford et al. 2021). A row and a column that are `alike` [B, B] are not negatives of each other.
    """
    own = torch.arange(len(rows), device=rows.device)
    others = alike & (own[:, None] != own)
    logits = (rows @ columns.T / temperature).masked_fill(others, -math.inf)
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def matching_positions(tokens: Tensor, others: Tensor, *, end_id: int) -> Tensor:
    """For each token of texts [..., L], the matching position in texts that differ in one word, int64 [..., L].

    Tokens of a common beginning match themselves; after it, positions are counted from the end, so that the last tokens
    of the two words match, and everything that follows them. Where a word has more tokens than the other's, its first
    tokens match the position before the word, where the encoder has seen nothing of it yet.
    """
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    common = (tokens == others).int().cumprod(-1).sum(-1, keepdim=True)
    longer = (first_end(tokens, end_id) - first_end(others, end_id))[..., None]
    shifted = torch.maximum(positions - longer, (common - 1).clamp(min=0)).clamp(max=tokens.shape[-1] - 1)
    return torch.where(positions < common, positions, shifted)
