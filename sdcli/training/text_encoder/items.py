"""Captions as tensors: tokenized once, with what the losses compare them with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdcli.encoders.tokenizer import WORD_END, ClipTokenizer
from sdcli.training.text_encoder.caption_files import Captions


@dataclass(frozen=True, eq=False)
class TextItems:
    """Tokenized captions, with the first caption of their image and the teacher's vectors; cheap to pickle."""

    ids: np.ndarray
    """Token ids [n, L], uint16 or int32."""
    texts: np.ndarray
    """int64 [n]: a number for each text; equal texts have the same one."""
    groups: np.ndarray
    """int64 [n], ascending: the number of each text's image; alternatives have the same one."""
    first: np.ndarray
    """int64 [groups + 1]: the index of each group's first text, and the number of texts."""
    end_id: int
    pad_id: int
    ends_word: np.ndarray
    """bool [vocabulary]: whether a token is the last of its word."""
    vectors: Tensor | None = None
    """The teacher's unit vectors [n, D]."""
    with_first: bool = False
    """Whether each item has the first caption of its group, too."""
    word_dropout: float = 0.0

    @classmethod
    def of(cls, captions: Captions, tokenizer: ClipTokenizer, **more: Any) -> TextItems:
        """Tokenize all captions."""
        vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        ids = np.full(
            (len(captions.texts), tokenizer.max_length), tokenizer.pad_id, np.uint16 if size <= 2**16 else np.int32
        )
        encodings = tokenizer.tokenizer.encode_batch_fast(list(captions.texts), add_special_tokens=False)
        for row, encoding in zip(ids, encodings, strict=True):
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
        """One caption's tensors; `draw` chooses the words that are left out."""
        dropout = self.word_dropout if word_dropout is None else word_dropout
        item = {
            "token_ids": self._tokens(index, draw, dropout),
            "text": torch.tensor(int(self.texts[index])),
        }
        if self.with_first:
            item["first_ids"] = self._tokens(int(self.first[self.groups[index]]), draw, 0.0)
        if self.vectors is not None:
            item["teacher"] = self.vectors[index]
        return item

    def lengths(self) -> np.ndarray:
        """The number of tokens of each caption without its start token, int64 [n]."""
        return (self.ids == self.end_id).argmax(axis=1)

    def _tokens(self, index: int, draw: random.Random, dropout: float) -> Tensor:
        row = self.ids[index].astype(np.int64)
        if dropout > 0:
            end = int((row == self.end_id).argmax())
            kept = _without_words(row[1:end], self.ends_word, draw, dropout)
            row[1 : end + 1] = self.pad_id
            row[1 : len(kept) + 2] = [*kept, self.end_id]
        return torch.from_numpy(row)


def _without_words(tokens: np.ndarray, ends_word: np.ndarray, draw: random.Random, dropout: float) -> np.ndarray:
    """Leave out each word with probability `dropout`, but never all of them."""
    word_of = np.concatenate([[0], np.cumsum(ends_word[tokens])[:-1]]).astype(np.int64) if len(tokens) else tokens
    count = int(word_of[-1]) + 1 if len(tokens) else 0
    kept = np.array([draw.random() >= dropout for _ in range(count)], dtype=bool)
    if count and not kept.any():
        kept[draw.randrange(count)] = True
    return tokens[kept[word_of]] if count else tokens
