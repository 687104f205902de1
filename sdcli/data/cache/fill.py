"""Fills the cache of latents: encodes images, except those that it already contains.

Threads read and decode images ahead of the encoder. Whatever ends the work, everything encoded is on the disk (after
`kill -9`, all but the current shard), and the next run continues from there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdcli.data.buckets import Size, resize_and_crop
from sdcli.data.cache.claims import Claims
from sdcli.data.cache.division import WAITING, Division, chunks_by_size, images_at_once, unit_length
from sdcli.data.cache.keys import (
    LOGVAR,
    MEAN,
    CacheVae,
    Crop,
    LatentIndex,
    LatentKeys,
)
from sdcli.data.cache.progress import CacheProgress
from sdcli.data.cache.shards import KEY_BYTES
from sdcli.data.cache.store import TensorStore
from sdcli.data.cache.vae_encoder import VaeEncoder
from sdcli.data.records import DroppedItem, ImageSet
from sdcli.errors import BadImage, NotFound, Stop, stop_if_asked
from sdcli.images.image_files import image_from_bytes
from sdcli.images.pixels import to_pixels
from sdcli.vae.autoencoder import Moments

Digests = Sequence[str] | Mapping[int, str]
"""The SHA-256 of files in hexadecimal, by item; "" where it is not known."""
NOT_FINITE = "its latents are not finite (NaN or too large), in float32 too"


def fill_latents(
    images: ImageSet,
    used: Sequence[int] | np.ndarray,
    sizes: Sequence[Size] | np.ndarray,
    *,
    vae: CacheVae,
    store: TensorStore,
    digests: Digests | None = None,
    flips: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    claims: Claims | None = None,
    unit: int | None = None,
    stop: Stop = lambda: None,
) -> Generator[CacheProgress, None, None]:
    """Encode the `used` items of a set, each at its size of `sizes` (width, height), with a centre crop.

    Stored are the moments of the VAE's distribution, unscaled, in the VAE's number format; with `flips` those
    of the mirrored images as well. `digests` are the SHA-256 of the images' bytes in hexadecimal, by item, as
    `examine` knows them: an image whose latents are all in the store is not read. Images of
    equal size are encoded `batch_size` at a time (default: 1 on the CPU, where more is not faster, else 8). Batch sizes
    differ in rounding, so only with 1 latents never depend on the other images. With `claims` the work is divided with
    other processes that fill this store at the same time; what they encode counts as reused. `unit` images are claimed
    at once, by default a number that follows from how many there are.

    An image that cannot be read, or whose latents are not finite, is dropped. Raises what `stop` returns, CannotWrite,
    OutOfMemory, and Offline where streamed images cannot be fetched.
    """
    ways = (False, True) if flips else (False,)
    items = np.asarray(used, dtype=np.int64)
    filling = _Filling(images, items, sizes, LatentKeys.of(vae), store, digests, ways)
    encoder = VaeEncoder(vae.network)
    store.refresh()
    filling.settle_known(np.arange(len(items)))
    yield filling.progress(notes=damage_notes(store))
    batches = _Batches(batch_size or images_at_once(vae.device.type))
    division = Division(store, claims, stop)
    length = unit or unit_length(len(items), batches.limit)
    units = [np.arange(len(items))] if claims is None else chunks_by_size(sizes, length)
    waited = False
    try:
        for places in division.turns(units, name=filling.name_of, is_done=filling.is_done):
            if places is None:
                yield filling.progress(notes=() if waited else (WAITING,))
                waited = True
                continue
            for prepared in filling.read_ahead(places, workers or _cpus(), held=batches.limit):
                stop_if_asked(stop)
                for waiting in filling.claim(prepared):
                    batch = batches.add(waiting)
                    if batch:
                        filling.keep(batch, encoder([one.pixels for one in batch]))
                yield filling.progress(notes=encoder.notes())
            for batch in batches.rest():
                stop_if_asked(stop)
                filling.keep(batch, encoder([one.pixels for one in batch]))
                yield filling.progress(notes=encoder.notes())
    finally:
        division.flush()
    yield filling.progress(latents=filling.index())


@dataclass(frozen=True)
class _Prepared:
    """An image from a reading thread: its keys, and its pixels if any of its latents are missing."""

    place: int
    """Place in `used`."""
    keys: tuple[bytes, ...] = ()
    """Of the image as it is, and mirrored."""
    missing: tuple[int, ...] = ()
    pixels: Tensor | None = None
    """[3, H, W] in 0..1, as it is."""
    reason: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class _Waiting:
    """An image as it is or mirrored, to be encoded under a key."""

    place: int
    key: bytes
    pixels: Tensor


_OPEN, _REUSED, _ENCODED, _DROPPED = range(4)


@dataclass
class _Filling:
    """The state of every image while the cache is filled."""

    images: ImageSet
    used: np.ndarray
    sizes: Sequence[Size] | np.ndarray
    makes: LatentKeys
    store: TensorStore
    digests: Digests | None
    flips: tuple[bool, ...]
    keys: np.ndarray = field(init=False)
    states: np.ndarray = field(init=False)
    counts: list[int] = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)
    owners: dict[bytes, int] = field(default_factory=dict)
    """Key -> the first image of this run with it; later ones have the same bytes."""
    failed: dict[bytes, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.keys = np.zeros((len(self.used), len(self.flips), KEY_BYTES), dtype=np.uint8)
        self.states = np.full(len(self.used), _OPEN, dtype=np.int8)
        self.counts = [len(self.used), 0, 0, 0]

    def keys_of(self, place: int, digest: bytes) -> tuple[bytes, ...]:
        width, height = (int(side) for side in self.sizes[place])
        return tuple(self.makes.key(digest, Crop((width, height), flip=flip)) for flip in self.flips)

    def name_of(self, unit: np.ndarray) -> str:
        """The name of a unit, which is the same in other processes for the same images and VAE."""
        digest = hashlib.sha256(f"{self.makes} {self.flips}\n".encode())
        for place in unit:
            index = int(self.used[place])
            content = self.digests[index] if self.digests is not None else ""
            width, height = self.sizes[place]
            digest.update(f"{content or self.images[index].name} {width}x{height}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def is_done(self, unit: np.ndarray) -> bool:
        """Whether no image of a unit is open any more; those that the store has meanwhile are settled."""
        self.settle_known(unit)
        return not (self.states[unit] == _OPEN).any()

    def settle_known(self, unit: np.ndarray) -> None:
        """Settle the images of a unit whose digest is known and whose latents are all in the store."""
        if self.digests is None:
            return
        open_ = unit[self.states[unit] == _OPEN]
        known = [int(place) for place in open_ if self.digests[int(self.used[place])]]
        if not known:
            return
        for place in known:
            if self.keys[place].any():
                continue
            self._set_keys(place, self.keys_of(place, bytes.fromhex(self.digests[int(self.used[place])])))
        there = self.store.find(self.keys[known].reshape(-1, KEY_BYTES)).reshape(len(known), -1) >= 0
        for place in np.array(known, dtype=np.int64)[there.all(axis=1)]:
            self._settle(int(place), _REUSED)

    def read_ahead(self, unit: np.ndarray, workers: int, *, held: int) -> Iterator[_Prepared]:
        """The open images of a unit in order, read and decoded by threads; at most `workers` + 2 `held` in memory."""
        todo = deque(int(place) for place in unit[self.states[unit] == _OPEN])
        pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="read-ahead")
        running: deque[Future[_Prepared]] = deque()
        try:
            while todo or running:
                while todo and len(running) < workers + 2 * held:
                    running.append(pool.submit(self._prepare, todo.popleft()))
                since = time.perf_counter()
                prepared = running.popleft().result()
                self.waited += time.perf_counter() - since
                yield prepared
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, place: int) -> _Prepared:
        """Runs in a thread."""
        index = int(self.used[place])
        name = self.images[index].name
        try:
            data = self.images.read(index)
            keys = self.keys_of(place, hashlib.sha256(data).digest())
            missing = tuple(way for way, key in enumerate(keys) if key not in self.store)
            if not missing:
                return _Prepared(place, keys)
            width, height = (int(side) for side in self.sizes[place])
            image = resize_and_crop(image_from_bytes(data, name=name), (width, height))
            return _Prepared(place, keys, missing, to_pixels(image))
        except (BadImage, NotFound) as error:
            return _Prepared(place, reason=str(error).removeprefix(f"{name}: "))
        except MemoryError:
            return _Prepared(place, reason="does not fit into memory")

    def claim(self, prepared: _Prepared) -> list[_Waiting]:
        """Record an image that was read, and return what this run has to encode of it."""
        place = prepared.place
        if prepared.reason:
            self.reasons[place] = prepared.reason
            self._settle(place, _DROPPED)
            return []
        self._set_keys(place, prepared.keys)
        waiting = []
        for way in prepared.missing:
            key = prepared.keys[way]
            if self.owners.setdefault(key, place) == place:
                assert prepared.pixels is not None
                pixels = prepared.pixels.flip(-1) if self.flips[way] else prepared.pixels
                waiting.append(_Waiting(place, key, pixels))
        if not waiting:
            self._settle(place, _REUSED)
        return waiting

    def keep(self, batch: Sequence[_Waiting], rows: Sequence[Moments | None]) -> None:
        """Store the latents of a batch; None stands for those that are not finite."""
        for one, moments in zip(batch, rows, strict=True):
            if moments is None:
                self.failed[one.key] = self.reasons[one.place] = NOT_FINITE
                self._settle(one.place, _DROPPED)
                continue
            mean, logvar = moments
            self.store.add(one.key, {MEAN: mean} if logvar is None else {MEAN: mean, LOGVAR: logvar})
            if self.states[one.place] != _DROPPED:
                self._settle(one.place, _ENCODED)

    def index(self) -> LatentIndex:
        """The index of all latents, after everything was encoded and flushed."""
        if self.failed:  # copies of an image whose latents are not finite were counted as reused
            for place in np.flatnonzero(self.states == _REUSED):
                reason = next((self.failed[key] for key in map(bytes, self.keys[place]) if key in self.failed), None)
                if reason is not None:
                    self.reasons[int(place)] = reason
                    self._settle(int(place), _DROPPED)
        good = np.flatnonzero(self.states != _DROPPED)
        good = good[np.argsort(self.used[good], kind="stable")]
        names = {place: self.images[int(self.used[place])].name for place in sorted(self.reasons)}
        dropped = (DroppedItem(name, self.reasons[place]) for place, name in names.items())
        return LatentIndex(self.used[good], self.keys[good], tuple(dropped))

    def progress(self, *, notes: tuple[str, ...] = (), latents: LatentIndex | None = None) -> CacheProgress:
        return CacheProgress(
            done=len(self.used) - self.counts[_OPEN],
            total=len(self.used),
            encoded=self.counts[_ENCODED],
            reused=self.counts[_REUSED],
            dropped=self.counts[_DROPPED],
            seconds=time.perf_counter() - self.began,
            waiting=self.waited,
            notes=notes,
            latents=latents,
        )

    def _set_keys(self, place: int, keys: tuple[bytes, ...]) -> None:
        self.keys[place] = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)

    def _settle(self, place: int, state: int) -> None:
        self.counts[self.states[place]] -= 1
        self.counts[state] += 1
        self.states[place] = state


class _Batches:
    """Groups images of equal size into batches; holds less than one batch of each size."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._gathered: dict[torch.Size, list[_Waiting]] = {}

    def add(self, waiting: _Waiting) -> list[_Waiting]:
        """Add an image; returns the batch that it completes, else an empty list."""
        batch = self._gathered.setdefault(waiting.pixels.shape, [])
        batch.append(waiting)
        return self._gathered.pop(waiting.pixels.shape) if len(batch) == self.limit else []

    def rest(self) -> Iterator[list[_Waiting]]:
        """The incomplete batches."""
        while self._gathered:
            yield self._gathered.popitem()[1]


def damage_notes(store: TensorStore) -> tuple[str, ...]:
    """A sentence for each damaged file of the store."""
    ending = "is damaged and ignored; its content is computed again, and it can be deleted"
    return tuple(f"{path} {ending}" for path in store.damaged)


def _cpus() -> int:
    """CPUs that this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, usable)
