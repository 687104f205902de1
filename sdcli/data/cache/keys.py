"""Keys of the cache, and the cached latents and text states that training reads instead of images and captions.

The key of a record is a SHA-256 over everything that its numbers depend on. A changed image, crop, network or number
format gives another key, so nothing in the cache is ever out of date; records that are no longer used just remain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from sdcli.data.buckets import Size
from sdcli.data.cache.records import Records
from sdcli.data.cache.shards import KEY_BYTES
from sdcli.data.cache.store import TensorStore
from sdcli.data.latent_folders import LatentFiles
from sdcli.data.records import DroppedItem
from sdcli.encoders.caption_encoder import CaptionEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import NotFound, UsageError
from sdcli.io.lean_diffusers import VAE

LATENTS, TEXTS = "latents", "texts"
"""The kinds of records, each a sub-folder of the cache."""
MEAN, LOGVAR = "mean", "logvar"
"""The names of the tensors in records of latents; those of texts are the text encoder's."""

_NOT_ARITHMETIC = frozenset(
    {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"}
)
"""Fields of a VAE's configuration that do not change what its encoder computes."""


# Keys


class _CacheNetwork:
    """A network whose outputs are cached."""

    network: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its computation and of the stored outputs."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(self.network.parameters()).device


@dataclass(frozen=True, eq=False)
class CacheVae(_CacheNetwork):
    """The VAE whose latents are cached."""

    network: VAE
    identity: str
    """Of its weights: `sha256:...` of the file, `random:...`; any other value: in memory only."""


@dataclass(frozen=True, eq=False)
class CacheTextEncoder(_CacheNetwork):
    """The text encoders whose hidden states are cached."""

    network: CaptionEncoder
    identities: tuple[str, ...]
    """Of the weights of each; see `CacheVae`."""
    model: str
    """The model's name, for error messages."""


@dataclass(frozen=True)
class Crop:
    """The arguments of `buckets.resize_and_crop` for an image."""

    size: Size
    at: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


@dataclass(frozen=True)
class LatentKeys:
    """The keys of images under one VAE."""

    vae: str
    """Weights and configuration."""
    dtype: str
    """The number format of the computation and of the stored latents."""

    @classmethod
    def of(cls, vae: CacheVae) -> Self:
        """The keys under a loaded VAE."""
        config = {
            name: value
            for name, value in dict(vae.network.config).items()
            if not name.startswith("_") and name not in _NOT_ARITHMETIC
        }
        weights = _weights(vae.network, vae.identity)
        return cls(f"{weights} {type(vae.network).__name__} {_digest(config)}", _name(vae.dtype))

    def key(self, image: bytes, crop: Crop) -> bytes:
        """The key of an image, given by the SHA-256 of its file."""
        (width, height), (x, y) = crop.size, crop.at
        cut = f"{width}x{height} at {float(x)!r} {float(y)!r}{' mirrored' if crop.flip else ''}"
        return _sha256("latents 1", self.vae, self.dtype, image.hex(), cut)


@dataclass(frozen=True)
class TextKeys:
    """The keys of texts under a model's text encoders."""

    encoder: str
    """Weights and configuration of the networks and of their tokenizers."""
    dtype: str

    @classmethod
    def of(cls, encoder: CacheTextEncoder) -> Self:
        """The keys under a loaded text encoder."""
        parts = []
        for reader, identity in zip(encoder.network.readers, encoder.identities, strict=True):
            config = _digest(dataclasses.asdict(reader.network.config))
            parts += [_weights(reader.network, identity), config, _tokenizer(reader.tokenizer)]
        zeros = ["zeros for the empty text"] if encoder.network.zeros_for_empty else []
        return cls(" ".join(parts + zeros), _name(encoder.dtype))

    def key(self, text: str) -> bytes:
        """The key of a text, as the text encoder gets it."""
        return _sha256("text 1", self.encoder, self.dtype, text)


def _weights(network: nn.Module, identity: str) -> str:
    """The identity of weights; those that exist in memory only have no file, so the numbers themselves are digested."""
    if identity.startswith(("sha256:", "random:")):
        return identity
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"tensors:{digest.hexdigest()}"


def _tokenizer(tokenizer: ClipTokenizer) -> str:
    """The digest of the tokenizer: vocabulary, merges, normalization, special tokens, length."""
    numbers = (tokenizer.max_length, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
    return _digest([tokenizer.tokenizer.to_str(), numbers])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(*parts: str) -> bytes:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Reading


@dataclass(frozen=True, eq=False)
class LatentIndex:
    """The cache keys of an image set's items."""

    items: np.ndarray
    """int64 [n], ascending: the items that have latents."""
    keys: np.ndarray
    """uint8 [n, f, 32]: the key of each as it is and, with f = 2, mirrored."""
    dropped: tuple[DroppedItem, ...] = ()
    """Items that could not be encoded."""


class CachedLatents:
    """Cached latents: (item, mirrored) -> mean [C, h, w] and log variance (or None), unscaled, in their stored dtype.

    In memory if all of them fit into `budget` bytes, otherwise read from the disk each time. Can be pickled for worker
    processes. Raises NotFound for a missing record, and DamagedCache for one that differs from what was written.
    """

    def __init__(self, store: TensorStore, index: LatentIndex, *, budget: int = 0) -> None:
        self.items = index.items
        count, self._ways, _ = index.keys.shape
        self._numbers = store.find(index.keys.reshape(-1, KEY_BYTES)).reshape(count, self._ways)
        missing = int((self._numbers < 0).any(axis=1).sum())
        if missing:
            raise NotFound(f"{store.path} lacks the latents of {missing:,} of {len(self.items):,} images")
        self._records = Records(store, self._numbers.reshape(-1), budget=budget)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def held(self) -> bool:
        """Whether they are in memory."""
        return self._records.held

    def __getitem__(self, wanted: tuple[int, bool]) -> tuple[Tensor, Tensor | None]:
        index, flipped = wanted
        place = int(np.searchsorted(self.items, index))
        if place >= len(self.items) or self.items[place] != index:
            raise NotFound(f"item {index} has no latents in the cache")
        if flipped and self._ways < 2:
            raise UsageError("the latents were cached without mirrored ones")
        record = self._records[int(self._numbers[place, int(flipped)])]
        return record[MEAN], record.get(LOGVAR)


class CachedTexts:
    """Cached text states: text -> what the `CaptionEncoder` gave, without the batch's dimension, in the stored dtype.

    `texts` are all that will be used; they are in memory if they fit into `budget` bytes, otherwise read from the
    disk each time. Can be pickled. Raises NotFound for a text that is not in the cache, and DamagedCache.
    """

    def __init__(self, store: TensorStore, keys: TextKeys, texts: Iterable[str], *, budget: int = 0) -> None:
        self._store, self._keys = store, keys
        known = dict.fromkeys(texts)
        wanted = np.frombuffer(b"".join(map(keys.key, known)), dtype=np.uint8).reshape(-1, KEY_BYTES)
        numbers = store.find(wanted)
        if (numbers < 0).any():
            first = list(known)[int(np.argmin(numbers))]
            raise NotFound(f"{store.path} lacks {int((numbers < 0).sum()):,} of {len(known):,} texts, first {first!r}")
        self._records = Records(store, numbers, budget=budget)

    @property
    def held(self) -> bool:
        """Whether they are in memory."""
        return self._records.held

    def __getitem__(self, text: str) -> dict[str, Tensor]:
        number = int(self._store.find(np.frombuffer(self._keys.key(text), dtype=np.uint8)[None])[0])
        if number not in self._records:
            raise NotFound(f"the cache has no state of the text {text!r}")
        return self._records[number]


@dataclass(frozen=True)
class EncodedLatents:
    """Latents that `sdcli encode` wrote, with the interface of `CachedLatents`: (mean [C, h, w], None), unscaled.

    Mirrored latents are not available. Raises NotFound and BadLatents.
    """

    files: LatentFiles

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, wanted: tuple[int, bool]) -> tuple[Tensor, None]:
        index, flipped = wanted
        if flipped:
            raise UsageError("latents in files cannot be mirrored: omit --random-flip")
        return self.files.read_latents(index).unscaled(self.files.scaling_factor)[0], None


def check_same_vae(files: LatentFiles, *, identity: str, model: str) -> None:
    """Raise UsageError if latent files were made with another VAE than the model's."""
    if files.vae != identity:
        raise UsageError(
            f"the latents in {files.source} were made with another VAE ({files.vae[:19]}) "
            f"than that of {model} ({identity[:19]})"
        )


def sample_latents(mean: Tensor, logvar: Tensor | None, noise: Tensor, scaling_factor: float) -> Tensor:
    """A sample of the VAE's distribution, scaled: (mean + exp(logvar / 2) noise) scaling_factor, float32.

    Equation 10 of Kingma & Welling 2013 (arXiv 1312.6114). Without a log variance the result is the scaled mean.
    """
    latents = mean.float()
    if logvar is not None:
        latents = latents + torch.exp(0.5 * logvar.float()) * noise
    return latents * scaling_factor
