"""Teachers of a text encoder: sentence encoders, or files of their vectors, and a cache of what they compute.

Distillation from sentence embeddings: Reimers & Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual
using Knowledge Distillation".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.files import sha256, write_whole
from sdcli.io.json_files import parse_json, read_json_list, read_json_object
from sdcli.io.weight_files import check_header, shards
from sdcli.io.weights import fill, read_tensors

ENCODERS = {"bert": "BertModel", "distilbert": "DistilBertModel", "mpnet": "MPNetModel", "roberta": "RobertaModel"}
"""model_type in a config.json -> the class of transformers; a teacher may be of these only."""
BATCH = 64
TEXTS_PER_FILE = 64 * BATCH
"""Texts whose vectors are stored in one file of the cache."""
_VECTORS, _TEXTS, _KEYS = "vectors", "texts", "keys"


class Teacher(Protocol):
    """Maps texts to vectors of their meaning."""

    @property
    def identity(self) -> str:
        """A digest of the teacher's files: `sha256:<64 hex digits>`."""

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        """Texts -> unit vectors [n, D], float32 on the CPU. Raises UsageError and BadWeights."""


def open_teacher(path: Path, *, device: torch.device | str = "cpu") -> Teacher:
    """Open a folder with a sentence encoder, or a .safetensors or .npz file of vectors.

    Raises NotFound, UsageError and BadWeights.
    """
    if path.is_dir():
        return SentenceEncoder.load(path, device=torch.device(device))
    if not path.exists():
        raise NotFound(f"no file or folder {path}")
    return StoredVectors.load(path)


# A sentence encoder in transformers' layout


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformer whose token states are pooled to one vector: the mean over the tokens, or the first token's."""

    folder: Path
    network: nn.Module
    tokenizer: Tokenizer
    pooling: str
    """`mean` or `cls`."""

    @classmethod
    def load(cls, folder: Path, *, device: torch.device) -> SentenceEncoder:
        """Load config.json, model.safetensors, tokenizer.json and, if present, sentence-transformers' files.

        Nothing is downloaded and no code of the folder is executed. Raises NotFound, UsageError and BadWeights.
        """
        config = read_json_object(
            folder / "config.json", missing="a teacher is a folder with a sentence encoder in transformers' layout"
        )
        name = ENCODERS.get(str(config.get("model_type")))
        if name is None:
            raise UsageError(
                f"{folder} is a model of type {config.get('model_type')!r}; teachers are {', '.join(sorted(ENCODERS))}"
            )
        pooling = _pooling(folder)
        limit = read_json_object(folder / "sentence_bert_config.json", default={}).get("max_seq_length")
        most = int(config.get("max_position_embeddings", 512)) - (2 if name in ("RobertaModel", "MPNetModel") else 0)
        tokenizer = _tokenizer(
            folder,
            limit=min(limit, most) if isinstance(limit, int) and limit > 2 else most,
            pad_id=config.get("pad_token_id"),
        )
        return cls(folder, _network(folder, name, config).to(device), tokenizer, pooling)

    @cached_property
    def identity(self) -> str:
        names = ["config.json", "tokenizer.json", "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"]
        return _digest([*(self.folder / name for name in names), *shards(self.folder, "model")])

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        device = next(self.network.parameters()).device
        encodings = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return _unit(pooled.cpu(), source=str(self.folder))


def _network(folder: Path, name: str, config: Mapping[str, Any]) -> nn.Module:
    """The network with weights read by `io.weights`: no pickle, no memory map, no adapter that the folder names."""
    import transformers

    kind = getattr(transformers, name)
    try:
        with torch.random.fork_rng(devices=[]):  # its random initialisation must not advance the global generator
            network: nn.Module = kind(kind.config_class.from_dict(dict(config)))
    except Exception as error:  # the library fails in many ways for a bad configuration
        raise BadWeights(f"{folder}: its configuration does not describe a {name}: {error}") from None
    wanted, prefix = set(network.state_dict()), f"{kind.base_model_prefix}."
    tensors: dict[str, Tensor] = {}
    for file in shards(folder, "model"):
        tensors |= read_tensors(file, torch.float32, rename=lambda stored: _known(stored.removeprefix(prefix), wanted))
    # The pooler is a head of BERT that sentence encoders do not use, and that their files often lack.
    unused = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("pooler.")}
    fill(network, {**unused, **tensors}, source=str(folder))
    return network.eval()


def _known(name: str, wanted: set[str]) -> str | None:
    return name if name in wanted else None


def _pooling(folder: Path) -> str:
    """The pooling of token states according to sentence-transformers' files; the mean if there are none."""
    modules = read_json_list(folder / "modules.json", default=[])
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UsageError(f"{folder} has layers that sdcli does not support in a teacher: {', '.join(sorted(unknown))}")
    config = read_json_object(folder / "1_Pooling" / "config.json", default={"pooling_mode_mean_tokens": True})
    modes = [
        name.removeprefix("pooling_mode_")
        for name, on in config.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    modes = modes or [{"mean": "mean_tokens", "cls": "cls_token"}.get(config.get("pooling_mode", ""), "nothing")]
    pooling = {"mean_tokens": "mean", "cls_token": "cls"}.get(modes[0]) if len(modes) == 1 else None
    if pooling is None:
        raise UsageError(
            f"{folder} pools by {' and '.join(modes)}; sdcli supports the mean over the tokens and the first token"
        )
    return pooling


def _tokenizer(folder: Path, *, limit: int, pad_id: Any) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFound(f"no file {path}; save the teacher's tokenizer with a recent transformers (save_pretrained)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a bad file
        raise BadWeights(f"{path} is not a tokenizer: {error}") from None
    pad = tokenizer.id_to_token(pad_id) if isinstance(pad_id, int) and pad_id >= 0 else None
    if pad is None:
        raise BadWeights(f"{folder}: its config.json has the padding token {pad_id!r}, which its tokenizer lacks")
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad)
    return tokenizer


# Vectors in a file


@dataclass(frozen=True)
class StoredVectors:
    """Precomputed vectors of texts, looked up by the exact text."""

    path: Path
    rows: Mapping[str, int]
    table: Tensor

    @classmethod
    def load(cls, path: Path) -> StoredVectors:
        """Load `vectors` [n, D] and `texts`: in an .npz an array of n strings, in a .safetensors a JSON list as uint8.

        Raises UsageError and BadWeights.
        """
        match path.suffix.lower():
            case ".npz":
                texts, vectors = _read_npz(path)
            case ".safetensors":
                texts, vectors = _read_safetensors(path)
            case _:
                raise UsageError(f"a teacher is a folder, a .safetensors or an .npz file, not {path}")
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.numel():
            shape = "x".join(map(str, vectors.shape))
            raise BadWeights(
                f"{path} holds {len(texts)} texts and vectors of shape {shape}; there must be one vector per text"
            )
        return cls(path, {text: row for row, text in enumerate(texts)}, _unit(vectors.float(), source=str(path)))

    @cached_property
    def identity(self) -> str:
        return _digest([self.path])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        missing = [text for text in texts if text not in self.rows]
        if missing:
            raise UsageError(
                f"{self.path} has no vector for {len(missing)} of {len(texts)} texts, first {missing[0]!r}"
            )
        return self.table[[self.rows[text] for text in texts]]


def _read_safetensors(path: Path) -> tuple[list[str], Tensor]:
    header = check_header(path)
    if not {_VECTORS, _TEXTS} <= set(header):
        raise BadWeights(f"{path} holds no tensors {_VECTORS!r} and {_TEXTS!r}")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            vectors, letters = file.get_tensor(_VECTORS), file.get_tensor(_TEXTS)
        texts = parse_json(bytes(letters.to(torch.uint8).numpy()))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("not a list of texts")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadWeights(f"{path} is damaged: {error}") from None
    return texts, vectors


def _read_npz(path: Path) -> tuple[list[str], Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            texts, vectors = file[_TEXTS], file[_VECTORS]
    except KeyError:
        raise BadWeights(f"{path} holds no arrays {_VECTORS!r} and {_TEXTS!r}") from None
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a bad file
        raise BadWeights(f"{path} cannot be read: {error}") from None
    if texts.dtype.kind != "U" or texts.ndim != 1 or vectors.dtype.kind != "f":
        raise BadWeights(f"{path} should hold {_TEXTS!r}, strings [n], and {_VECTORS!r}, floating-point numbers [n, D]")
    return texts.tolist(), torch.from_numpy(vectors.astype(np.float32))


# The cache


@dataclass
class TeacherVectors:
    """A teacher's vectors by text, in memory and, with a `folder`, in files there.

    A text's key is the SHA-256 of the teacher's identity and the text, so vectors of another teacher are never used.
    """

    identity: str
    folder: Path | None
    broken: list[Path] = field(default_factory=list)
    """Files of the folder that could not be read; their vectors are computed again."""
    _known: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, teacher: Teacher, cache: Path | None) -> TeacherVectors:
        """Open the cache of a teacher; precomputed vectors need no files."""
        if cache is None or isinstance(teacher, StoredVectors):
            return cls(teacher.identity, None)
        name = hashlib.sha256(teacher.identity.encode()).hexdigest()[:16]
        folder = cache / f"teacher-{name}"
        vectors = cls(teacher.identity, folder)
        for path in sorted(folder.glob("*.safetensors")):
            vectors._read(path)
        return vectors

    def compute(self, teacher: Teacher, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Compute and store the missing vectors; yields (done, total). Stopped half-way, it continues there next time.

        Raises CannotWrite, and whatever the teacher raises.
        """
        missing = sorted(
            {text for text in texts if self._key(text) not in self._known}, key=lambda text: (len(text), text)
        )
        done = 0
        for first in range(0, len(missing), TEXTS_PER_FILE):
            together = missing[first : first + TEXTS_PER_FILE]
            vectors = []
            for start in range(0, len(together), BATCH):  # sorted by length, so that there is little padding
                vectors.append(teacher(together[start : start + BATCH]))
                done += len(vectors[-1])
                yield done, len(missing)
            self._store([self._key(text) for text in together], torch.cat(vectors))

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The unit vectors [n, D] of texts whose vectors are there, float32."""
        return torch.stack([self._known[self._key(text)] for text in texts])

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.identity}\0{text}".encode()).digest()

    def _store(self, keys: list[bytes], vectors: Tensor) -> None:
        self._known.update(zip(keys, vectors, strict=True))
        if self.folder is not None:
            joined = b"".join(keys)
            table = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).reshape(len(keys), -1).copy())
            path = self.folder / f"{hashlib.sha256(joined).hexdigest()[:32]}.safetensors"
            write_whole(path, save({_KEYS: table, _VECTORS: vectors.contiguous()}), overwrite=True)

    def _read(self, path: Path) -> None:
        try:
            header = check_header(path)
            if not {_KEYS, _VECTORS} <= set(header):
                raise BadWeights("it lacks keys or vectors")
            with safe_open(path, framework="pt", backend="pread") as file:
                keys, vectors = file.get_tensor(_KEYS), file.get_tensor(_VECTORS)
            sound = keys.dtype == torch.uint8 and keys.shape == (len(vectors), 32) and vectors.dtype == torch.float32
            if not sound or not torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-3):
                raise BadWeights("its vectors are not unit vectors")
        except (BadWeights, SafetensorError, OSError, RuntimeError, IndexError, TypeError):
            self.broken.append(path)
            return
        self._known.update(zip((bytes(key) for key in keys.numpy()), vectors, strict=True))


# Shared


def _unit(vectors: Tensor, *, source: str) -> Tensor:
    if not vectors.isfinite().all() or not vectors.norm(dim=1).all():
        raise BadWeights(f"{source} has vectors that are zero or not finite")
    return F.normalize(vectors, dim=1)


def _digest(paths: Sequence[Path]) -> str:
    """`sha256:` of the names and contents of those files that exist."""
    total = hashlib.sha256()
    for path in paths:
        if path.is_file():
            total.update(f"{path.name} {sha256(path)}\n".encode())
    return f"sha256:{total.hexdigest()}"
