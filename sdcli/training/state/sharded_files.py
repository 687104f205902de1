"""Files of tensors of which each process holds some rows: written and read without the whole ever being in memory.

Model files are ordinary safetensors files: the first process writes one tensor after another (`write_one_by_one`).
Optimizer states are written by every process, its own rows into its own files, by torch.distributed.checkpoint, in
safetensors and without pickle; it reads them back into any number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdcli.errors import BadWeights, first_line
from sdcli.training.state.rows import first_row, has_rows, local, whole

FILE_BYTES = 2**30
"""Each process writes its rows in files of about this size, because the library holds a second copy of one file."""
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_one_by_one(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with one whole tensor in memory at a time; in the first process.

    The bytes are those that the safetensors library writes for tensors of one dtype. Raises OSError.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    spelled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    spelled += b" " * (-len(spelled) % 8)
    with open(path, "wb") as file:
        file.write(len(spelled).to_bytes(8, "little") + spelled)
        for name in names:
            data = whole(tensors[name]).detach().cpu().contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)


def sort_metadata(path: Path, *, durable: bool = False) -> None:
    """Sort the metadata entries of a file, whose order the library changes from process to process.

    So equal content gives equal bytes, and two runs can be compared by the digests of their files. `durable`: sync the
    file to the disk, which otherwise the checkpoint does.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        spelled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(spelled) <= size:
            file.seek(8)
            file.write(spelled.ljust(size))
        if durable:
            file.flush()
            os.fsync(file.fileno())


def copy_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors, or the rows of them that this process holds, with those of a file. Raises BadWeights."""
    try:
        # pread instead of mmap: see weights.read_tensors
        with safe_open(path, framework="pt", backend="pread") as file, torch.no_grad():
            for name, target in targets.items():
                stored, own = file.get_slice(name), local(target)
                if list(stored.get_shape()) != list(target.shape):
                    raise BadWeights(f"{path}: {name} has the shape {stored.get_shape()}, not {list(target.shape)}")
                if not has_rows(target):
                    own.copy_(file.get_tensor(name))
                elif len(own):
                    start = first_row(target)
                    own.copy_(stored[start : start + len(own)])
    except (SafetensorError, OSError) as error:
        raise BadWeights(f"{path} is damaged: {error}") from None


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's rows of tensors into its own files in a folder; all processes call it together.

    Equal rows give equal bytes. Raises OSError in every process if it fails in one.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    try:
        with _quietly():
            dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    for path in folder.glob(f"{shard_name(torch.distributed.get_rank())}*"):
        sort_metadata(path, durable=True)


def read_shards(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, or the rows of them that this process holds, from a folder of any number of processes.

    Raises BadWeights.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quietly():
            dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise BadWeights(f"{folder} does not hold the optimizer's state: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """The first line of an error, or of that within one of the library, which spells out tracebacks."""
    failures = getattr(error, "failures", None)
    return first_line(next(iter(failures.values()))[0] if failures else error)


def shard_name(rank: int) -> str:
    """What the names of the files of a process begin with; the library gives the names."""
    return f"shard-{rank + 1:05d}-"


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file of each tensor, from 1, the same in every process."""
    sizes = {name: math.prod(tensor.shape) * tensor.element_size() for name, tensor in tensors.items()}
    processes = torch.distributed.get_world_size()
    numbers, total = {}, 0
    for name, size in sizes.items():
        numbers[name] = total // FILE_BYTES + 1
        total += size // processes
    return numbers


class _quietly(warnings.catch_warnings):
    """Without the library's remarks about how it is called."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
