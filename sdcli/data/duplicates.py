"""Duplicates in an image set: equal bytes, or nearly equal appearance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

BANDS = 4
"""Hashes that differ in fewer bits than there are bands share a band, so only pairs that share one are compared."""
PLAIN = 6
"""Hashes with fewer bits set or unset are not compared: plain images have nearly equal hashes."""


def same_bytes(digests: Sequence[str], used: Iterable[int]) -> list[list[int]]:
    """Groups of indices whose images are equal byte for byte, each group in ascending order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in used:
        groups[digests[int(index)]].append(int(index))
    return [group for group in groups.values() if len(group) > 1]


def similar(
    hashes: np.ndarray, sizes: np.ndarray, digests: Sequence[str], used: Iterable[int], *, bits: int = 2
) -> list[list[int]]:
    """Groups of images of nearly equal appearance with different bytes, such as resized or recompressed copies.

    `hashes`: uint64 [n] difference hashes; pairs differ in at most `bits` (0..3) of 64, and their aspect ratios by at
    most 5%. A hint only. Of images with equal bytes only the first is compared.
    """
    if not 0 <= bits < BANDS:
        raise ValueError(f"bits must be 0 to {BANDS - 1}")
    firsts = {digests[int(index)]: int(index) for index in reversed(list(used))}
    chosen = np.array(sorted(firsts.values()), dtype=np.int64)
    ones = np.bitwise_count(hashes[chosen])
    chosen = chosen[(ones >= PLAIN) & (ones <= 64 - PLAIN)]
    parent = {int(index): int(index) for index in chosen}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    aspects = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    for band in range(BANDS):
        keys = (hashes[chosen] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(chosen[order], edges):
            for place, index in enumerate(bucket[:-1]):
                others = bucket[place + 1 :]
                near = np.bitwise_count(hashes[others] ^ hashes[index]) <= bits
                near &= np.abs(aspects[others] - aspects[index]) < 0.05
                for other in others[near]:
                    parent[root(int(other))] = root(int(index))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in parent:
        groups[root(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]
