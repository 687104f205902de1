"""A store of small tensors on disk by key, in shards that any process may add and none changes.

The index is made from the headers of the shards (see `shards`), so it never goes stale; checksums find whatever was
damaged on the disk before it is used.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sdcli.data.cache.shards import DTYPES, KEY_BYTES, DamagedCache, TensorLayout, changed, records_in, shard_of
from sdcli.errors import NotFound
from sdcli.io.files import write_whole
from sdcli.io.temporary_files import sweep
from sdcli.io.weight_files import MAX_TENSORS

SHARD_BYTES = 64 * 2**20
FLUSH_SECONDS = 120.0
"""A shard is written after this time at the latest: the most that a killed process loses."""
MAX_OPEN_SHARDS = 256
"""Shards that are kept open; others are opened for each read."""


@dataclass(frozen=True, eq=False)
class _Index:
    """The positions of all records in arrays, about 80 bytes a record. Replaced as a whole, never modified."""

    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, KEY_BYTES), dtype=np.uint8))
    shards: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    layouts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """The place of each record's layout in `_layouts`."""
    firsts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Where a record's tensors begin in the two arrays below."""
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    checksums: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Sorts the records by the beginning of their keys; of equal keys the older record comes first."""
    sorted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=">u8"))


class TensorStore:
    """The records of one kind in a folder: key (32 bytes) -> named tensors. Reading never writes; nothing is replaced.

    Several processes may add to one folder at a time; what others have added is seen after `refresh`. Reading is safe
    from several threads, and a copy in another process (pickled or forked) reads through files of its own; records
    that were added and not yet flushed stay behind.
    """

    def __init__(self, folder: Path, kind: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.kind = folder, kind
        self._shard_bytes = shard_bytes
        self._shards: list[str] = []
        self._damaged: list[str] = []
        self._layouts: list[tuple[TensorLayout, ...]] = []
        self._index = _Index()
        self._reset()
        self.refresh()

    def _reset(self) -> None:
        """Initialize the state that each process has for itself."""
        self._lock = threading.RLock()
        self._pending: dict[bytes, dict[str, Tensor]] = {}
        self._pending_bytes = self._pending_tensors = 0
        self._pending_since = 0.0
        self._files: dict[int, int] = {}
        self._closing = weakref.finalize(self, _close_all, self._files)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_pending", "_pending_bytes", "_pending_tensors", "_pending_since", "_files", "_closing")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        _close_all(self._files)

    @property
    def path(self) -> Path:
        """The folder of the shards."""
        return self.folder / self.kind

    @property
    def damaged(self) -> tuple[Path, ...]:
        """Files that differ from what was written. They are ignored, and can be deleted."""
        return tuple(self.path / name for name in self._damaged)

    def __len__(self) -> int:
        """The number of records on the disk."""
        return len(self._index.keys)

    @property
    def pending(self) -> int:
        """Records that were added and are not on the disk yet."""
        return len(self._pending)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or self._number(key) >= 0

    # Reading

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Keys, uint8 [n, 32] -> the numbers of their records for `read`, int64 [n]; -1 for missing keys.

        A number stays valid for the lifetime of the store.
        """
        index = self._index
        wanted = _beginnings(keys)
        places = np.searchsorted(index.sorted, wanted)
        numbers = np.full(len(keys), -1, dtype=np.int64)
        open_ = np.arange(len(keys))
        while len(open_):
            open_ = open_[places[open_] < len(index.sorted)]
            open_ = open_[index.sorted[places[open_]] == wanted[open_]]
            candidates = index.order[places[open_]]
            same = (index.keys[candidates] == keys[open_]).all(axis=1)
            numbers[open_[same]] = candidates[same]
            open_ = open_[~same]
            places[open_] += 1
        return numbers

    def _number(self, key: bytes) -> int:
        return int(self.find(np.frombuffer(key, dtype=np.uint8)[None])[0])

    def get(self, key: bytes) -> dict[str, Tensor]:
        """The tensors of one record, flushed or not. Raises NotFound and DamagedCache."""
        pending = self._pending.get(key)
        if pending is not None:
            return {name: tensor.clone() for name, tensor in pending.items()}
        number = self._number(key)
        if number < 0:
            raise NotFound(f"{self.path} has no record {key.hex()}")
        return self.read(number)

    def read(self, number: int) -> dict[str, Tensor]:
        """Read and verify the tensors of a record by its number. Raises DamagedCache."""
        index = self._index
        shard, first = int(index.shards[number]), int(index.firsts[number])
        record = {}
        for place, part in enumerate(self._layouts[index.layouts[number]], start=first):
            data = self._bytes_at(shard, int(index.offsets[place]), part.size)
            if zlib.crc32(data) != index.checksums[place]:
                raise DamagedCache(changed(self.path / self._shards[shard]))
            dtype = DTYPES[part.dtype]
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            record[part.name] = flat.reshape(part.shape)
        return record

    def size_of(self, numbers: np.ndarray) -> int:
        """Bytes of the tensors of these records together."""
        if not len(numbers):
            return 0
        sizes = np.array([sum(part.size for part in layout) for layout in self._layouts], dtype=np.int64)
        return int(sizes[self._index.layouts[numbers]].sum())

    def layouts_of(self, numbers: np.ndarray) -> tuple[np.ndarray, Sequence[tuple[TensorLayout, ...]]]:
        """The layout of each of these records, int32 [n], as places in the list of all layouts."""
        return self._index.layouts[numbers], self._layouts

    def _bytes_at(self, shard: int, offset: int, size: int) -> bytearray:
        path = self.path / self._shards[shard]
        try:
            descriptor = self._descriptor(shard, path)
            if descriptor is not None:
                data = bytearray(os.pread(descriptor, size, offset))
            else:
                with open(path, "rb", buffering=0) as file:
                    file.seek(offset)
                    data = bytearray(file.read(size))
        except FileNotFoundError:
            raise DamagedCache(f"{path} was deleted while in use; start again, and it is computed again") from None
        except OSError as error:
            raise DamagedCache(f"cannot read {path}: {error.strerror}") from None
        if len(data) < size:
            raise DamagedCache(f"{path} became shorter while in use; start again, and it is computed again")
        return data

    def _descriptor(self, shard: int, path: Path) -> int | None:
        """The descriptor of a shard that stays open in this process. If two threads open it, one descriptor is kept."""
        known = self._files.get(shard)
        if known is not None or len(self._files) >= MAX_OPEN_SHARDS:
            return known
        opened = os.open(path, os.O_RDONLY)
        kept = self._files.setdefault(shard, opened)
        if kept != opened:
            os.close(opened)
        return kept

    # Writing

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Add a record; it is on the disk after `flush`, which happens automatically every 64 MB or two minutes.

        A key that exists keeps its record: equal keys mean equal content. Raises CannotWrite.
        """
        if len(key) != KEY_BYTES or not tensors:
            raise ValueError(f"a record is a key of {KEY_BYTES} bytes and at least one tensor")
        with self._lock:
            if key in self:
                return
            if self._pending_tensors + len(tensors) > MAX_TENSORS:
                self.flush()
            if not self._pending:
                self._pending_since = time.monotonic()
            # copies: a row of a batch would keep the whole batch alive, and callers could change it
            self._pending[key] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
            self._pending_tensors += len(tensors)
            if self._pending_bytes >= self._shard_bytes or time.monotonic() - self._pending_since > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write the added records as a shard, atomically and durably. Raises CannotWrite."""
        with self._lock:
            if not self._pending:
                return
            name, data = shard_of(self._pending, self.kind)
            sweep(self.path)
            write_whole(self.path / name, data, overwrite=False)
            self._index_shards([name])  # before they leave memory, so that other threads find them at any time
            self._pending = {}
            self._pending_bytes = self._pending_tensors = 0

    # The index

    def refresh(self) -> None:
        """Index the shards that other processes have added."""
        with self._lock:
            known = {*self._shards, *self._damaged}
            found: list[tuple[int, str]] = []
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(".safetensors") and entry.name not in known:
                        with contextlib.suppress(FileNotFoundError):
                            found.append((entry.stat().st_mtime_ns, entry.name))
            # the oldest first: of equal records all readers use the same one
            with _without_collecting_garbage():
                self._index_shards([name for _, name in sorted(found)])

    def _index_shards(self, names: Sequence[str]) -> None:
        """Append the records of shards to the index."""
        numbers = {layout: number for number, layout in enumerate(self._layouts)}
        keys: list[bytes] = []
        shards: list[int] = []
        layouts: list[int] = []
        firsts: list[int] = []
        offsets: list[int] = []
        checksums: list[int] = []
        before = len(self._index.offsets)
        for name in names:
            try:
                records = records_in(self.path / name)
            except DamagedCache:
                self._damaged.append(name)
                continue
            for key, parts in records.items():
                keys.append(key)
                shards.append(len(self._shards))
                layouts.append(numbers.setdefault(tuple(part for part, _, _ in parts), len(numbers)))
                firsts.append(before + len(offsets))
                offsets += [offset for _, offset, _ in parts]
                checksums += [checksum for _, _, checksum in parts]
            self._shards.append(name)
        if not keys:
            return
        old = self._index
        all_keys = np.concatenate([old.keys, np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)])
        beginnings = _beginnings(all_keys)
        order = np.argsort(beginnings, kind="stable")
        self._layouts = list(numbers)
        self._index = _Index(
            keys=all_keys,
            shards=np.concatenate([old.shards, np.array(shards, dtype=np.int32)]),
            layouts=np.concatenate([old.layouts, np.array(layouts, dtype=np.int32)]),
            firsts=np.concatenate([old.firsts, np.array(firsts, dtype=np.int64)]),
            offsets=np.concatenate([old.offsets, np.array(offsets, dtype=np.int64)]),
            checksums=np.concatenate([old.checksums, np.array(checksums, dtype=np.uint32)]),
            order=order,
            sorted=beginnings[order],
        )


@contextlib.contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Garbage collection took half of the time: headers become millions of small objects, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _beginnings(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of keys, uint8 [n, 32], as numbers."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1)


def _close_all(files: dict[int, int]) -> None:
    while files:
        _, descriptor = files.popitem()
        with contextlib.suppress(OSError):
            os.close(descriptor)
