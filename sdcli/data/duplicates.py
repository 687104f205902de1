"""Images that are there twice: the same bytes, or nearly the same look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

BANDS = 4
"""Hashes that differ in fewer bits than there are bands have a band in common, and only such pairs are compared."""
PLAIN = 6
"""Hashes with fewer bits set or unset say too little: one plain image looks like another."""


def same_bytes(digests: Sequence[str], used: Iterable[int]) -> list[list[int]]:
    """Groups of indices whose images are equal byte for byte, each group rising."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in used:
        groups[digests[int(index)]].append(int(index))
    return [group for group in groups.values() if len(group) > 1]


def similar(
    hashes: np.ndarray, sizes: np.ndarray, digests: Sequence[str], used: Iterable[int], *, bits: int = 2
) -> list[list[int]]:
    """Groups of images that look nearly the same and are not equal: resized or compressed anew, perhaps.

    `hashes`: uint64 [n] difference hashes; pairs differ in at most `bits` (0..3) of 64, and their aspect ratios by at
    most 5%. A hint only. Of equal images one stands for all.
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
