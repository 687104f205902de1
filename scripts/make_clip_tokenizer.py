"""Build sdcli/encoders/clip_tokenizer/, the BPE tokenizer of CLIP ViT-L/14, from the vocabulary that OpenAI published.

The vocabulary file, bpe_simple_vocab_16e6.txt.gz, is in the wheel of open_clip_torch (MIT):

    pip download --no-deps open_clip_torch
    python scripts/make_clip_tokenizer.py open_clip_torch-*.whl
"""

from __future__ import annotations

import argparse
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49408 - 2 * 256 - 2
"""CLIP has 49,408 tokens: two for each byte, two special tokens, and one for each of the file's first merges."""
MAX_LENGTH = 77
FOLDER = Path(__file__).resolve().parent.parent / "sdcli" / "encoders" / "clip_tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=f"the open_clip_torch wheel, or {VOCABULARY}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: %(default)s)")
    chosen = parser.parse_args()
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(read_merges(chosen.source)).items():
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (out / name).write_text(text + "\n", encoding="utf-8")
        print(out / name)


def read_merges(source: Path) -> list[tuple[str, str]]:
    """The pairs that CLIP merges, the most frequent first."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            packed = wheel.read(f"open_clip/{VOCABULARY}")
    else:
        packed = source.read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : MERGES + 1]]  # the first line is a version header
    return [(left, right) for left, right in pairs]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: the 256 bytes, the same at the end of a word, every merged pair, then the two special tokens."""
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in the order of GPT-2's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def tokenizer_files(merges: list[tuple[str, str]]) -> dict[str, Any]:
    """File name -> content, in the form that transformers' CLIPTokenizer saves and loads."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab=vocabulary(merges), merges=merges, model_max_length=MAX_LENGTH)
    return {
        "tokenizer.json": json.loads(tokenizer.backend_tokenizer.to_str()),
        "tokenizer_config.json": {
            "backend": "tokenizers",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "model_max_length": MAX_LENGTH,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": "<|endoftext|>",
        },
    }


if __name__ == "__main__":
    main()
