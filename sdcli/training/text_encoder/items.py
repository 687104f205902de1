"""Captions as tensors: tokenized once, each with an alternative and a teacher's vector, as the draw has it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdcli.encoders.tokenizer import WORD_END, ClipTokenizer
from sdcli.training.text_encoder.caption_files import Captions
from sdcli.training.text_encoder.vocabulary import in_this_thread


@dataclass(frozen=True, eq=False)
class TextItems:
    """Captions as the network takes them, and what the losses compare them with. Cheap to hand to worker processes."""

    ids: np.ndarray
    """Token ids [n, L], uint16 or int32."""
    texts: np.ndarray
    """int64 [n]: equal texts have the same number."""
    groups: np.ndarray
    """int64 [n], never falling: alternatives have the same number."""
    first: np.ndarray
    """int64 [groups + 1]: where each group begins."""
    end_id: int
    pad_id: int
    ends_word: np.ndarray
    """bool [vocabulary]: whether a token is the last of its word."""
    vectors: Tensor | None = None
    """The teacher's unit vectors [n, D]."""
    partners: bool = False
    firsts: bool = False
    """Whether each comes with the first caption of its group."""
    word_dropout: float = 0.0

    @classmethod
    def of(cls, captions: Captions, tokenizer: ClipTokenizer, **more: Any) -> TextItems:
        """Tokenize captions, once for all."""
        vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        ids = np.full(
            (len(captions.texts), tokenizer.max_length), tokenizer.pad_id, np.uint16 if size <= 2**16 else np.int32
        )
        with in_this_thread():
            encoded = tokenizer.tokenizer.encode_batch_fast(list(captions.texts), add_special_tokens=False)
        for row, encoding in zip(ids, encoded, strict=True):
            words = encoding.ids[: tokenizer.max_length - 2]
            row[: len(words) + 2] = [tokenizer.start_id, *words, tokenizer.end_id]
        ends_word = np.zeros(size, dtype=bool)
        ends_word[[number for token, number in vocabulary.items() if token.endswith(WORD_END)]] = True
        numbers: dict[str, int] = {}
        groups = np.array(captions.groups, dtype=np.int64)
        return cls(
            ids=ids,
            texts=np.array([numbers.setdefault(text, len(numbers)) for text in captions.texts], dtype=np.int64),
            groups=groups,
            first=np.searchsorted(groups, np.arange(groups[-1] + 2)),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            ends_word=ends_word,
            **more,
        )

    def item(self, index: int, *, draw: random.Random, word_dropout: float | None = None) -> dict[str, Tensor]:
        """One caption's tensors; `draw` chooses its partner and the words that are left out."""
        dropout = self.word_dropout if word_dropout is None else word_dropout
        item = {
            "token_ids": self._tokens(index, draw, dropout),
            "text": torch.tensor(int(self.texts[index])),
            "group": torch.tensor(int(self.groups[index])),
        }
        if self.partners:
            partner = self._partner(index, draw)
            item["partner_ids"] = self._tokens(partner, draw, dropout)
            item["partner_text"] = torch.tensor(int(self.texts[partner]))
            item["has_partner"] = torch.tensor(int(partner != index))
        if self.firsts:
            item["first_ids"] = self._tokens(int(self.first[self.groups[index]]), draw, 0.0)
        if self.vectors is not None:
            item["teacher"] = self.vectors[index]
        return item

    def lengths(self) -> np.ndarray:
        """How many tokens each caption predicts: its words' and the end, int64 [n]."""
        return (self.ids == self.end_id).argmax(axis=1)

    def has_alternative(self) -> np.ndarray:
        """Which captions share their group with another, bool [n]."""
        return (np.diff(self.first) > 1)[self.groups]

    def _partner(self, index: int, draw: random.Random) -> int:
        """Another caption of the group; the caption itself where it is alone."""
        start, stop = (int(place) for place in self.first[self.groups[index] : self.groups[index] + 2])
        if stop - start < 2:
            return index
        other = start + draw.randrange(stop - start - 1)
        return other + (other >= index)

    def _tokens(self, index: int, draw: random.Random, dropout: float) -> Tensor:
        row = self.ids[index].astype(np.int64)
        if dropout > 0:
            end = int((row == self.end_id).argmax())
            kept = _without_words(row[1:end], self.ends_word, draw, dropout)
            row[1 : end + 1] = self.pad_id
            row[1 : len(kept) + 2] = [*kept, self.end_id]
        return torch.from_numpy(row)


def _without_words(tokens: np.ndarray, ends_word: np.ndarray, draw: random.Random, dropout: float) -> np.ndarray:
    """Leave out each word with a chance, but never all of them."""
    word_of = np.concatenate([[0], np.cumsum(ends_word[tokens])[:-1]]).astype(np.int64) if len(tokens) else tokens
    count = int(word_of[-1]) + 1 if len(tokens) else 0
    kept = np.array([draw.random() >= dropout for _ in range(count)], dtype=bool)
    if count and not kept.any():
        kept[draw.randrange(count)] = True
    return tokens[kept[word_of]] if count else tokens
