"""The format of a shard: a safetensors file whose name holds the digest of its header, and its header the CRC-32s.

Its tensors are called `<key>.<name>`, with the key of 32 bytes in hexadecimal.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from sdcli.errors import BadWeights, SdcliError
from sdcli.io.weight_files import check_header

KEY_BYTES = 32
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHECKSUMS = "crc32"
_SHARD_NAME = re.compile(r"([0-9a-f]{16})-[0-9a-f]{8}\.safetensors")


class DamagedCache(SdcliError):
    """A file of the cache differs from what was written."""


class TensorLayout(NamedTuple):  # an index has hundreds of thousands; faster than a dataclass
    """The name, dtype and shape of one tensor of a record."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def shard_of(records: Mapping[bytes, Mapping[str, Tensor]], kind: str) -> tuple[str, bytes]:
    """The name, which is unique, and the bytes of a shard with these records."""
    tensors = {f"{key.hex()}.{name}": tensor for key, record in records.items() for name, tensor in record.items()}
    checksums = "".join(f"{zlib.crc32(_bytes_of(tensors[name])):08x}" for name in sorted(tensors))
    data = save(tensors, metadata={"kind": kind, _CHECKSUMS: checksums})
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    return f"{_header_digest(header)}-{secrets.token_hex(4)}.safetensors", data


def records_in(path: Path) -> dict[bytes, list[tuple[TensorLayout, int, int]]]:
    """The records in a shard by its header: key -> for each tensor its part, offset in the file and CRC-32.

    Raises DamagedCache if the header differs from what was written; then no record of the shard is used.
    """
    try:
        header = check_header(path)
        with open(path, "rb") as file:
            start = file.read(8)
            raw = start + file.read(int.from_bytes(start, "little"))
    except (BadWeights, OSError):
        raise DamagedCache(changed(path)) from None
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or _header_digest(raw) != name[1]:
        raise DamagedCache(changed(path))
    records: dict[str, list[tuple[TensorLayout, int, int]]] = {}
    sizes: dict[TensorLayout, int] = {}
    try:
        checksums = bytes.fromhex(header.pop("__metadata__")[_CHECKSUMS])
        for place, stored in enumerate(sorted(header)):
            entry = header[stored]
            key, name_in_record = stored[: 2 * KEY_BYTES], stored[2 * KEY_BYTES + 1 :]
            part = TensorLayout(name_in_record, entry["dtype"], tuple(entry["shape"]))
            if part not in sizes:
                sizes[part] = part.size
            begin, end = entry["data_offsets"]
            if begin < 0 or end - begin != sizes[part]:
                raise ValueError
            checksum = int.from_bytes(checksums[4 * place : 4 * place + 4])
            records.setdefault(key, []).append((part, len(raw) + begin, checksum))
        return {bytes.fromhex(key): parts for key, parts in records.items()}
    except (KeyError, TypeError, ValueError):
        raise DamagedCache(changed(path)) from None


def changed(path: Path) -> str:
    return f"{path} is damaged; delete it, and its content is computed again"


def _header_digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
