"""The files of textual inversion embeddings as they are asked for: the words they stand for, and their digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from sdcli.errors import NotFound, UsageError
from sdcli.request import EmbeddingRef

MAX_BYTES = 64 * 2**20
"""Far more than any embedding has; some pickles and checkpoints would be larger."""
_WORD = re.compile(r"[^\s()\[\]:|\\]{1,100}")


def resolved(embeddings: Sequence[EmbeddingRef]) -> tuple[EmbeddingRef, ...]:
    """Embeddings with the word of each (by default its file's name) and its digest.

    Raises NotFound, and UsageError for a file that has another digest than is asked for, for what is no .safetensors
    file, for a word that cannot stand in a prompt and for two of one word.
    """
    complete = tuple(_resolved(embedding) for embedding in embeddings)
    words = [str(embedding.token).lower() for embedding in complete]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UsageError(f"embeddings: two of them stand for {twice!r}; name one's word: FILE=WORD")
    return complete


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits. Raises NotFound and UsageError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"cannot read the embedding {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, which no embedding is")
    return hashlib.sha256(data).hexdigest()


def _resolved(embedding: EmbeddingRef) -> EmbeddingRef:
    path = Path(embedding.path).expanduser()
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"embeddings: {path} is no .safetensors file, the only kind that sdcli reads")
    word = embedding.token if embedding.token is not None else path.stem
    if not _WORD.fullmatch(word):
        raise UsageError(f"embeddings: {word!r} cannot be a word of a prompt; name another: FILE=WORD")
    digest = digest_of(path)
    if embedding.sha256 not in (None, digest):
        raise UsageError(f"{path} is another file now: its SHA-256 is {digest[:12]}..., not {embedding.sha256[:12]}...")
    return embedding.model_copy(update={"token": word, "sha256": digest})
