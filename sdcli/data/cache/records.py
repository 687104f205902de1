"""Records of a store that are read repeatedly: in memory if they fit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sdcli.data.cache.shards import DTYPES
from sdcli.data.cache.store import TensorStore


class Records:
    """Some records of a store by number: in memory if they fit into `budget` bytes, else read each time.

    Raises DamagedCache; for records in memory already when they are loaded.
    """

    def __init__(self, store: TensorStore, numbers: np.ndarray, *, budget: int = 0) -> None:
        self._store = store
        self._numbers = np.unique(numbers)
        self._stacks: list[dict[str, Tensor]] = []
        self.held = 0 < store.size_of(self._numbers) <= budget
        """Whether they are in memory."""
        if self.held:
            self._hold()

    def __contains__(self, number: int) -> bool:
        place = int(np.searchsorted(self._numbers, number))
        return place < len(self._numbers) and bool(self._numbers[place] == number)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not self.held:
            return self._store.read(number)
        place = int(np.searchsorted(self._numbers, number))
        stack = self._stacks[self._stack_of[place]]
        return {name: tensor[self._row_of[place]].clone() for name, tensor in stack.items()}

    def _hold(self) -> None:
        """Load the records, stacked by layout: many tensor objects would take more memory than small latents."""
        layouts, kinds = self._store.layouts_of(self._numbers)
        self._stack_of = np.zeros(len(self._numbers), dtype=np.int32)
        self._row_of = np.zeros(len(self._numbers), dtype=np.int64)
        for number, layout in enumerate(np.unique(layouts)):
            places = np.flatnonzero(layouts == layout)
            self._stack_of[places], self._row_of[places] = number, np.arange(len(places))
            stack = {
                part.name: torch.empty((len(places), *part.shape), dtype=DTYPES[part.dtype]) for part in kinds[layout]
            }
            for row, place in enumerate(places):
                for name, tensor in self._store.read(int(self._numbers[place])).items():
                    stack[name][row] = tensor
            self._stacks.append(stack)
