"""Networks in evaluation mode for the time of a block: to validate, or to generate sample images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Switch dropout and the like off inside the block; afterwards each layer is in the mode it was in before."""
    layers = [layer for network in networks for layer in network.modules() if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
