"""Textual inversion: the vectors of .safetensors files that stand for words; Gal et al. 2022, arXiv 2208.01618."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdcli.errors import BadWeights, UsageError
from sdcli.io.files import expanded
from sdcli.io.weight_files import check_header
from sdcli.io.weight_kinds import EMBEDDING, kind_of
from sdcli.io.weights import read_tensors
from sdcli.request.fields import EmbeddingRef
from sdcli.request.input_files import pinned

CLIP_L, CLIP_G = "clip_l", "clip_g"
"""What SDXL's files call the vectors of its first and its second text encoder."""
_ALSO = {"text_encoders_0": CLIP_L, "text_encoders_1": CLIP_G, "emp_params": "emb_params"}
"""Other names for them: of diffusers' pivotal tuning, and OneTrainer's for A1111's `emb_params`."""
OUTPUT = {"emp_params_out", "clip_l_out", "clip_g_out"}
"""OneTrainer's vectors for the output of a text encoder."""


@dataclass(frozen=True)
class Embeddings:
    """Words and the rows that stand for each."""

    tokens: Mapping[str, range] = field(default_factory=dict)
    vectors: tuple[Tensor, ...] = ()
    """[M, D] for each text encoder, all rows one after the other; empty where there are none."""


def read_embeddings(
    embeddings: Sequence[EmbeddingRef], *, widths: Mapping[str, int], most: int, model: str
) -> Embeddings:
    """The vectors of resolved embeddings, float32, for text encoders that read `most` tokens at once.

    `widths` gives the width of each encoder's vectors, by its name of CLIP_L and CLIP_G. Three layouts are
    known: A1111's `emb_params`, a single tensor by any name (diffusers takes the word for it), both for one encoder
    alone, and SDXL's pair `clip_l`, `clip_g`. Each holds [n, D], or [D] for one vector. Vectors for the output of a
    text encoder are left (see `embedding_notes`).
    Raises UsageError where they do not fit the encoders, or are not what was resolved; BadWeights for a damaged file.
    """
    tokens: dict[str, range] = {}
    rows: list[list[Tensor]] = []
    count = 0
    for embedding in embeddings:
        vectors = _vectors(embedding, widths=widths, model=model)
        length = len(vectors[0])
        if length > most:
            raise UsageError(f"{embedding.path} has {length} vectors; {model} reads {most} tokens at once")
        tokens[embedding.word] = range(count, count + length)
        rows.append(vectors)
        count += length
    return Embeddings(tokens, tuple(torch.cat(of_encoder) for of_encoder in zip(*rows, strict=True)))


def _vectors(embedding: EmbeddingRef, *, widths: Mapping[str, int], model: str) -> list[Tensor]:
    """The vectors for each encoder, equally many."""
    path = expanded(embedding.path)
    pinned(embedding)
    kind = kind_of(check_header(path))
    if kind is not None and kind is not EMBEDDING:
        raise BadWeights(f"{path} is not a textual inversion embedding: it is {kind.described(path)}")
    stored = read_tensors(path, torch.float32)
    tensors = {_ALSO.get(name, name): tensor for name, tensor in stored.items() if name not in OUTPUT}
    left = [name for name in stored if name in OUTPUT]
    if left and not any(tensor.any() for tensor in tensors.values()):
        raise UsageError(
            f"{path} holds vectors for the output of the text encoder alone ({left[0]}), which sdcli cannot use; "
            "in OneTrainer train it without the output embedding"
        )
    if widths.keys() <= tensors.keys():
        chosen = [tensors[name] for name in widths]
    elif len(tensors) != 1 and "emb_params" not in tensors:
        raise BadWeights(f"{path} is not a textual inversion embedding: it has {len(tensors)} tensors")
    elif len(widths) > 1:
        names = " and ".join(widths)
        raise UsageError(f"{path} was made for one text encoder, and {model} has two (its files hold {names})")
    else:
        chosen = [tensors["emb_params"] if len(tensors) > 1 else next(iter(tensors.values()))]
    found = [_checked(one, path, width, model=model) for one, width in zip(chosen, widths.values(), strict=True)]
    if len({len(one) for one in found}) > 1:
        raise BadWeights(f"{path}: has not as many vectors for one text encoder as for the other")
    return found


def embedding_notes(embeddings: Sequence[EmbeddingRef], *, encoders: Collection[str]) -> list[str]:
    """What is not taken over of the files of embeddings for a model with these text encoders. Raises BadWeights."""
    unused = {name for name, part in ((CLIP_L, "text_encoder"), (CLIP_G, "text_encoder_2")) if part not in encoders}
    notes = []
    for embedding in embeddings:
        names = {_ALSO.get(name, name): name for name in check_header(expanded(embedding.path))}
        for name, stored in names.items():
            if name in OUTPUT:
                notes.append(f"{embedding.path}: {stored} is not taken over: it is for the output of the text encoder")
            elif name in unused and {CLIP_L, CLIP_G} <= names.keys():
                notes.append(f"{embedding.path}: {stored} is not taken over: the model has no such text encoder")
    return notes


def _checked(vectors: Tensor, path: Path, width: int, *, model: str) -> Tensor:
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors):
        raise BadWeights(f"{path} is not a textual inversion embedding: its tensor should be [vectors, width]")
    if vectors.shape[1] != width:
        raise UsageError(
            f"{path} was made for another text encoder: its vectors have {vectors.shape[1]} numbers, "
            f"{model}'s have {width}"
        )
    if not vectors.isfinite().all():
        raise BadWeights(f"{path} holds numbers that are not finite")
    return vectors
