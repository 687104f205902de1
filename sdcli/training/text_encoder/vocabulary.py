"""Learns a BPE vocabulary in CLIP's format from captions, and writes tokenizer folders for sdcli and transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers

from sdcli.encoders.tokenizer import END, START, WORD_END, ClipTokenizer, clip_bpe
from sdcli.errors import UsageError
from sdcli.io.json_files import read_json_object

# The library reads this at each call. Its thread pool does not survive a fork, and it would warn at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LETTERS: tuple[str, ...] = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
"""The 256 characters that stand for bytes, in the order of CLIP's vocabulary."""
MIN_SIZE = 2 * len(LETTERS) + 2
"""Every byte, inside a word and at its end; the start and the end token."""
MAX_LENGTH = 77
MAX_TOKENIZER_BYTES = 2**24
MIN_FREQUENCY = 2
"""Occurrences of a pair before it is merged."""


def train_vocabulary(texts: Iterable[str], *, size: int, max_length: int) -> ClipTokenizer:
    """Learn at most `size` tokens by byte-pair encoding (Sennrich et al. 2016), laid out as CLIP's vocabulary.

    Ids: 256 bytes, 256 bytes that end a word, then the merged tokens in the order of merging, start, end. So every text
    has tokens. The vocabulary is smaller than `size` where no more pairs occur twice. It depends on the texts, not on
    their order. `max_length` counts start and end. Raises UsageError.
    """
    if size < MIN_SIZE:
        raise UsageError(f"a vocabulary has at least {MIN_SIZE} tokens (every byte twice, start and end), not {size}")
    if not 3 <= max_length <= MAX_LENGTH:
        raise UsageError(f"a text encoder here takes 3 to {MAX_LENGTH} tokens, not {max_length}")
    letters = [*LETTERS, *(letter + WORD_END for letter in LETTERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        min_frequency=MIN_FREQUENCY,
        show_progress=False,
        # The trainer numbers letters at the ends of words in the order of a hash table, which differs from run to run,
        # and breaks ties between pairs by their numbers. Special tokens come first, in the order given.
        special_tokens=letters,
        initial_alphabet=list(LETTERS),
        end_of_word_suffix=WORD_END,
    )
    learner = clip_bpe({}, [])
    learner.train_from_iterator((text.replace(START, " ").replace(END, " ") for text in texts), trainer)
    vocabulary, merges = _learned(learner)
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    tokenizer = clip_bpe(vocabulary, merges)
    tokenizer.add_special_tokens([START, END])
    end = vocabulary[END]
    return ClipTokenizer(tokenizer, max_length, start_id=vocabulary[START], end_id=end, pad_id=end)


def save_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json.

    A tokenizer with further special tokens, which these files cannot hold, gets a tokenizer.json too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _learned(tokenizer.tokenizer)
    special = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": tokenizer.tokenizer.id_to_token(tokenizer.pad_id),
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length, **special}
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    added = {token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()}
    if added - {START, END}:
        _write(folder / "tokenizer.json", tokenizer.tokenizer.to_str())


def add_vocabulary_files(folder: Path) -> None:
    """Write vocab.json and merges.txt beside a copied CLIP tokenizer.json, the only one that older tools do not read.

    A folder that has them, or a tokenizer of another kind, stays as it is.
    """
    file = folder / "tokenizer.json"
    if (folder / "vocab.json").exists() or not file.is_file():
        return
    content = read_json_object(file, max_bytes=MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    vocabulary = dict(sorted({**model["vocab"], **added}.items(), key=lambda entry: entry[1]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def _learned(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A tokenizer's vocabulary, sorted by id, and its merges."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    return vocabulary, [(left, right) for left, right in model["merges"]]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
