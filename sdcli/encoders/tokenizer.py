"""CLIP's byte-level BPE tokenizer, read from a model's tokenizer folder and run by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdcli.errors import BadWeights, SdcliError
from sdcli.io.json_files import read_json_object
from sdcli.io.stand_ins import stand_in
from sdcli.request.prompt_syntax import Chunk, Text, chunked

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it."""

    ids: tuple[int, ...]
    """Exactly `max_length` ids: start, the words, end, padding."""
    cut: str
    """The end of the prompt that did not fit; empty where all did."""
    count: int
    """How many tokens the whole prompt has, without start and end."""


@dataclass(frozen=True)
class ClipTokenizer:
    """Text -> token ids, padded or cut to `max_length`."""

    tokenizer: Tokenizer
    max_length: int
    start_id: int
    end_id: int
    pad_id: int

    def __call__(self, text: str) -> Tokens:
        """Start and end are always there; a longer text is cut before the end token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        kept = encoding.ids[: self.room]
        cut = text_from(text, encoding.offsets, self.room)
        return Tokens(ids=self.framed(kept), cut=cut, count=len(encoding.ids))

    @property
    def room(self) -> int:
        """How many tokens fit between start and end."""
        return self.max_length - 2

    @property
    def comma_id(self) -> int | None:
        """The id of a comma, where the vocabulary has one."""
        return self.tokenizer.token_to_id(f",{WORD_END}")

    def chunks(self, text: Text, *, tokens: Mapping[str, range] = MappingProxyType({})) -> tuple[Chunk, ...]:
        """A parsed text as chunks with weights, as `prompt_syntax.chunked` makes them."""
        return chunked(text, self.words, room=self.room, comma=self.comma_id, tokens=tokens)

    def words(self, text: str) -> list[int]:
        """The ids of a text alone, without start and end, however many there are."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def spelled(self, *ids: int) -> str:
        """The letters that tokens stand for, one after another; a letter cut in two shows as �."""
        tokens = [self.tokenizer.id_to_token(id) or "" for id in ids]
        return str(decoders.ByteLevel().decode([token.removesuffix(WORD_END) for token in tokens]))

    def ends_word(self, id: int) -> bool:
        """Whether a word ends with the token."""
        return (self.tokenizer.id_to_token(id) or "").endswith(WORD_END)

    def framed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids that fit, between start and end and padded to `max_length`."""
        return (self.start_id, *ids, self.end_id, *[self.pad_id] * (self.room - len(ids)))


def text_from(text: str, offsets: list[tuple[int, int]], first: int) -> str:
    """The part of the text that token number `first` and all later ones stand for."""
    return text[offsets[first][0] :].strip() if len(offsets) > first else ""


def load_tokenizer(folder: Path) -> ClipTokenizer:
    """Read tokenizer.json, or vocab.json and merges.txt. Raises NotFound and BadWeights."""
    config = read_json_object(folder / "tokenizer_config.json", default={})
    special = {**read_json_object(folder / "special_tokens_map.json", default={}), **config}
    pad = special.get("pad_token") or END
    if isinstance(pad, dict):
        pad = pad.get("content", END)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = _from_vocabulary(folder)
    except SdcliError:
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        pointers = map(stand_in, (folder / "tokenizer.json", folder / "merges.txt"))
        reason = next((one for one in pointers if one is not None), f"{folder} holds no usable tokenizer: {error}")
        raise BadWeights(reason) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start_id, end_id, pad_id = (tokenizer.token_to_id(token) for token in (START, END, pad))
    if start_id is None or end_id is None or pad_id is None:
        raise BadWeights(f"{folder} is not a CLIP tokenizer: it has no {START} and {END}")
    max_length = config.get("model_max_length", 77)
    limit = max_length if isinstance(max_length, int) and max_length <= 77 else 77
    return ClipTokenizer(tokenizer, limit, start_id, end_id, pad_id)


def _from_vocabulary(folder: Path) -> Tokenizer:
    vocabulary = read_json_object(folder / "vocab.json", missing="the tokenizer needs it", max_bytes=2**24)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#version"))
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if START not in vocabulary or END not in vocabulary:
        raise BadWeights(f"{folder} is not a CLIP tokenizer: vocab.json has no {START} and {END}")
    tokenizer = clip_bpe(vocabulary, merges)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def clip_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The same parts as transformers 5 builds for CLIP (tests/test_clip.py compares the ids); no special tokens yet."""
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            fuse_unk=False,
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
