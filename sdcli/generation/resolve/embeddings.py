"""Textual inversion embeddings as they are asked for: the words they stand for, and which files they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sdcli.errors import UsageError
from sdcli.generation.resolve.init_image import identified
from sdcli.request.fields import EmbeddingRef

_WORD = re.compile(r"[^\s()\[\]:|\\]{1,100}")


def resolved(embeddings: Sequence[EmbeddingRef]) -> tuple[EmbeddingRef, ...]:
    """Embeddings with the word of each (by default its file's name) and its digest.

    Raises UsageError for what is no .safetensors file, for a word that cannot stand in a prompt and for two of one
    word, and what `canvas.identified` raises.
    """
    complete = tuple(_resolved(embedding) for embedding in embeddings)
    words = [str(embedding.token).lower() for embedding in complete]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UsageError(f"embeddings: two of them stand for {twice!r}; name one's word: FILE=WORD")
    return complete


def _resolved(embedding: EmbeddingRef) -> EmbeddingRef:
    path = Path(embedding.path)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"embeddings: {path} is no .safetensors file, the only kind that sdcli reads")
    word = embedding.token if embedding.token is not None else path.stem
    if not _WORD.fullmatch(word):
        raise UsageError(f"embeddings: {word!r} cannot be a word of a prompt; name another: FILE=WORD")
    return embedding.model_copy(update={"token": word, "sha256": identified(embedding).sha256})
