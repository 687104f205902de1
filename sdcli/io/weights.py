"""Safetensors files -> the parameters of one network, read once, in the run's dtype, and checked name by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdcli.errors import BadWeights
from sdcli.io.weight_files import check_header

N = TypeVar("N", bound=nn.Module)


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
    """Give an empty network its parameters; the tensors become the parameters, nothing is copied. Raises BadWeights."""
    check_fit(network, tensors, source=source)
    network.load_state_dict(tensors, strict=True, assign=True)
    network.requires_grad_(False)


def check_fit(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Raise BadWeights, naming the first parameter of a network that is missing, of another shape, or unknown."""
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
