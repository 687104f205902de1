"""The conditioning of training samples: text states, token ids, a class, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdcli.data.cache.keys import CachedTexts
from sdcli.data.records import ImageSet
from sdcli.encoders.caption_encoder import token_ids
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.io import rng
from sdcli.training.inputs.captions import CaptionRules
from sdcli.training.task import Draw


class SampleConditioning(Protocol):
    """The conditioning of an item. Both methods are pure functions of their arguments."""

    def item(self, draw: Draw) -> dict[str, Tensor]: ...

    def fixed(self, index: int) -> dict[str, Tensor]:
        """The conditioning without randomness, for validation."""


@dataclass(frozen=True)
class NoConditioning:
    """For unconditional networks."""

    def item(self, draw: Draw) -> dict[str, Tensor]:
        return {}

    def fixed(self, index: int) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class TextConditioning:
    """Captions as text states from the cache, or as token `ids` [encoders, L] that are encoded in the loop.

    Text states are `hidden` [L, D] and, of models with several text encoders, `pooled` [P].
    """

    images: ImageSet
    rules: CaptionRules
    seed: int
    states: CachedTexts | None = None
    """Cached text states; None to tokenize instead."""
    tokenizers: tuple[ClipTokenizer, ...] = ()
    """Of the text encoders, for captions that are not cached."""
    ignored: bool = False
    """Use the empty caption for every sample: unconditional training of a network with text conditioning."""

    def item(self, draw: Draw) -> dict[str, Tensor]:
        captions = () if self.ignored else self.images[draw.index].captions
        return self._tensors(self.rules.text(captions, seed=self.seed, counter=draw.counter))

    def fixed(self, index: int) -> dict[str, Tensor]:
        captions = () if self.ignored else self.images[index].captions
        return self._tensors(self.rules.wrapped(captions[0]) if captions else "")

    def _tensors(self, text: str) -> dict[str, Tensor]:
        if self.states is not None:
            return {name: numbers.float() for name, numbers in self.states[text].items()}
        return {"ids": token_ids(self.tokenizers, text)}


@dataclass(frozen=True)
class ClassConditioning:
    """Classes as `label`, a number; the number after the last class stands for no class, for guidance."""

    images: ImageSet
    numbers: Mapping[str, int]
    seed: int
    dropout: float = 0.1

    def item(self, draw: Draw) -> dict[str, Tensor]:
        dropped = rng.scalars(self.seed, draw.counter, "caption").random() < self.dropout
        return {"label": torch.tensor(len(self.numbers))} if dropped else self.fixed(draw.index)

    def fixed(self, index: int) -> dict[str, Tensor]:
        label = self.images[index].label
        assert label is not None
        return {"label": torch.tensor(self.numbers[label])}
