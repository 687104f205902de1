"""Safetensors files -> the parameters of one network, read once, in the run's dtype, and checked name by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdcli.errors import BadWeights
from sdcli.io.pickles import is_pickle, pickle_refused

N = TypeVar("N", bound=nn.Module)
MAX_HEADER_BYTES = 20_000_000
MAX_TENSORS = 20_000
FLOATS = {"F64", "F32", "F16", "BF16"}


def empty_network(make: Callable[[], N], *, source: str) -> N:
    """Build a network without allocating or initialising its parameters (they are on the meta device).

    Raises BadWeights where the configuration that `make` takes describes none; `source` is for the sentence.
    """
    with torch.device("meta"), network_described(source):
        return make().eval().requires_grad_(False)


@contextlib.contextmanager
def network_described(source: str) -> Iterator[None]:
    """Raise BadWeights for all that a network's class raises when its configuration makes no sense."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise BadWeights(f"{source}: its configuration describes no network: {error}") from None


def fill(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Give an empty network its parameters; the tensors become the parameters, nothing is copied.

    Raises BadWeights, naming the first parameter that is missing, of another shape, or unknown.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise BadWeights(
            f"{source} lacks {len(missing)} of the {len(wanted)} weights its configuration asks for, first {missing[0]}"
        )
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise BadWeights(
            f"{source} has {len(unknown)} weights that its configuration has no place for, first {unknown[0]}"
        )
    for name, parameter in wanted.items():
        if parameter.shape != tensors[name].shape:
            raise BadWeights(
                f"{source}: {name} has shape {_shape(tensors[name])}, its configuration asks for {_shape(parameter)}"
            )
    network.load_state_dict(tensors, strict=True, assign=True)
    network.requires_grad_(False)


def read_tensors(
    path: Path, dtype: torch.dtype, *, rename: Callable[[str], str | None] = lambda name: name
) -> dict[str, Tensor]:
    """All floating-point tensors of a file, each read and cast on its own so that no second copy of the file is held.

    `rename` maps a stored name to the wanted one; None leaves the tensor in the file. Raises BadWeights.
    """
    check_header(path)
    tensors: dict[str, Tensor] = {}
    try:
        # pread, not mmap: a mapped file counts as memory, and kills the process if somebody truncates it meanwhile
        with safe_open(path, framework="pt", backend="pread") as file:
            for stored in file.keys():  # noqa: SIM118  (not a mapping)
                name = rename(stored)
                if name is not None:
                    tensors[name] = file.get_tensor(stored).to(dtype)
    except (SafetensorError, OSError) as error:
        raise BadWeights(f"{path} is damaged: {error}") from None
    return tensors


def shards(folder: Path, stem: str, *, variant: str | None = None) -> list[Path]:
    """The weight files of a diffusers sub-folder: `stem.safetensors`, its variant, or the shards of its index."""
    for suffix in (f".{variant}", "") if variant else ("", ".fp16"):
        if (folder / f"{stem}{suffix}.safetensors").is_file():
            return [folder / f"{stem}{suffix}.safetensors"]
        for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
            if (folder / index).is_file():
                return [folder / name for name in _shard_names(folder / index)]
    pickles = [path for path in folder.glob("*") if path.suffix in {".bin", ".ckpt", ".pt", ".pth"}]
    if pickles:
        raise BadWeights(pickle_refused(pickles[0]))
    raise BadWeights(f"{folder} has no weights: expected {stem}.safetensors")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise BadWeights(f"{index} is no index of weight files: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise BadWeights(f"{index} names the shard {name!r}, which is not beside it")
    return names


def check_header(path: Path) -> dict[str, Any]:
    """The parsed header of a safetensors file, checked before anything else reads it.

    Raises BadWeights with a sentence of its own for a pickle, an empty, truncated or hostile file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if is_pickle(start, size=size):
                raise BadWeights(pickle_refused(path))
            if size < 8 + 2 or (length > MAX_HEADER_BYTES and length > size):
                raise BadWeights(f"{path} is no safetensors file")
            if length > MAX_HEADER_BYTES:
                raise BadWeights(
                    f"{path} has a header of {length:,} bytes; no model needs more than {MAX_HEADER_BYTES:,}"
                )
            if length > size - 8:
                raise BadWeights(f"{path} is cut short: its header alone has {length:,} bytes, the file {size:,}")
            raw = file.read(length)
        header = json.loads(raw)
    except OSError as error:
        raise BadWeights(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadWeights(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise BadWeights(f"{path} is no safetensors file: its header is no table of tensors")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(tensors) > MAX_TENSORS:
        raise BadWeights(
            f"{path} has {len(tensors):,} tensors; no model that sdcli knows has more than {MAX_TENSORS:,}"
        )
    ends = [
        entry["data_offsets"][1]
        for entry in tensors.values()
        if _are_numbers(entry.get("shape")) and _are_numbers(entry.get("data_offsets"), count=2)
    ]
    if len(ends) != len(tensors):
        raise BadWeights(f"{path} is no safetensors file: a tensor in its header has no place or no shape")
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise BadWeights(f"{path} is cut short: {size:,} bytes of {expected:,}; download or copy it again")
    return header


def _are_numbers(value: Any, *, count: int | None = None) -> bool:
    return isinstance(value, list) and len(value) == (count or len(value)) and all(isinstance(n, int) for n in value)


def random_tensors(network: nn.Module, dtype: torch.dtype, *, seed: int) -> dict[str, Tensor]:
    """Random parameters for an empty network, quickly: one block of normal numbers, read cyclically.

    Matrices are scaled by 1/sqrt(fan in), norms are 1 and biases 0, so that the numbers stay finite at any depth.
    The same seed gives the same weights in every dtype, up to rounding.
    """
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(seed))
    position = 0
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.state_dict().items():
        if parameter.ndim < 2:
            tensors[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=dtype)
            continue
        scale = parameter[0].numel() ** -0.5 if "embedding.weight" not in name else 0.02
        scaled = (block * scale).to(dtype)
        tensors[name] = torch.empty(parameter.shape, dtype=dtype)
        for part in _blocks(tensors[name].view(-1), len(block) - position, len(block)):
            part.copy_(scaled[position : position + len(part)])
            position = (position + len(part)) % len(block)
    return tensors


def _blocks(flat: Tensor, first: int, size: int) -> Iterator[Tensor]:
    yield flat[:first]
    for start in range(first, len(flat), size):
        yield flat[start : start + size]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "()"
