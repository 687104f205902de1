"""Counter-based random numbers: every one of a training run is a pure function of (seed, counter, purpose).

No generator state is carried from step to step, so a resumed run needs none, and the numbers of a sample do not depend
on the number of workers or processes. The counter of a sample is its position in the whole run: step * total batch
size + place in the batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def key(seed: int, counter: int, purpose: str) -> int:
    """A 63-bit number for (seed, counter, purpose); different purposes are independent of each other."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{counter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def scalars(seed: int, counter: int, purpose: str) -> random.Random:
    """A generator of single numbers: `.random()` in 0..1, `.randrange(n)`."""
    return random.Random(key(seed, counter, purpose))


def noise(seed: int, counter: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers of a shape, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(key(seed, counter, purpose)))


def permutation(seed: int, epoch: int, purpose: str, size: int) -> np.ndarray:
    """A permutation of 0..size-1 that differs from epoch to epoch, int64 [size].

    Sorts raw Philox output, whose stream NumPy promises never to change (unlike that of its `permutation`).
    """
    bits = np.random.Philox(key=key(seed, epoch, purpose)).random_raw(size)
    return np.argsort(bits, kind="stable")
