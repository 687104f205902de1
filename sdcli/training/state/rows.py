"""Tensors of which each process holds some rows (torch's DTensor; see `training/sharding.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def has_rows(tensor: Tensor) -> bool:
    """Whether this process holds some rows only. By its attribute: importing DTensor takes longer than a short run."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """The rows that this process holds, in the same memory; of a whole tensor the tensor itself."""
    if not has_rows(tensor):
        found: Tensor = tensor
        return found
    with torch.no_grad():
        rows: Tensor = tensor.to_local()
    return rows


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole: itself, or gathered from all processes where each holds some rows, inside of `fetching`."""
    return _fetch[-1](tensor) if has_rows(tensor) else tensor


@contextmanager
def fetching(fetch: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block `fetch` is how `whole` gathers a tensor."""
    _fetch.append(fetch)
    try:
        yield
    finally:
        _fetch.remove(fetch)


_fetch: list[Callable[[Tensor], Tensor]] = []


def first_row(tensor: Any) -> int:
    """The number of the first row that this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offsets[0])


def like_rows(tensor: Any, whole: Tensor) -> Tensor:
    """This process's rows of a tensor that every process has as a whole, as rows of `tensor` are held."""
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(whole, tensor.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=tensor.placements)
