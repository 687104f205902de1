"""Textual inversion: the vectors of .safetensors files that stand for words; Gal et al. 2022, arXiv 2208.01618."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdcli.canvas import identified
from sdcli.errors import BadWeights, UsageError
from sdcli.request import known
from sdcli.request_parts import EmbeddingRef
from sdcli.weights import read_tensors


@dataclass(frozen=True)
class Embeddings:
    """Words and the rows that stand for each."""

    tokens: Mapping[str, range] = field(default_factory=dict)
    vectors: Tensor | None = None
    """[M, D], all rows one after the other; None where there are none."""


def read_embeddings(embeddings: Sequence[EmbeddingRef], *, width: int, most: int, model: str) -> Embeddings:
    """The vectors of resolved embeddings, float32, for a text encoder of `width` that reads `most` tokens at once.

    Three layouts are known: A1111's `emb_params`, a single tensor by any name (diffusers takes the word for it), and
    SDXL's pair `clip_l`, `clip_g`, of which the former is taken. Each holds [n, D], or [D] for one vector.
    Raises UsageError where they do not fit the encoder, or are not what was resolved; BadWeights for a damaged file.
    """
    tokens: dict[str, range] = {}
    rows: list[Tensor] = []
    count = 0
    for embedding in embeddings:
        vectors = _vectors(embedding, width=width, model=model)
        if len(vectors) > most:
            raise UsageError(f"{embedding.path} has {len(vectors)} vectors; {model} reads {most} tokens at once")
        tokens[known(embedding.token)] = range(count, count + len(vectors))
        rows.append(vectors)
        count += len(vectors)
    return Embeddings(tokens, torch.cat(rows) if rows else None)


def _vectors(embedding: EmbeddingRef, *, width: int, model: str) -> Tensor:
    path = Path(embedding.path).expanduser()
    identified(embedding)
    tensors = read_tensors(path, torch.float32)
    if len(tensors) == 1:
        (vectors,) = tensors.values()
    elif name := next((name for name in ("emb_params", "clip_l") if name in tensors), None):
        vectors = tensors[name]
    else:
        raise BadWeights(f"{path} is no textual inversion embedding: it has {len(tensors)} tensors")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors):
        raise BadWeights(f"{path} is no textual inversion embedding: its tensor should be [vectors, width]")
    if vectors.shape[1] != width:
        raise UsageError(
            f"{path} was made for another text encoder: its vectors have {vectors.shape[1]} numbers, "
            f"{model}'s have {width}"
        )
    if not vectors.isfinite().all():
        raise BadWeights(f"{path} holds numbers that are not finite")
    return vectors
