"""Our CLIP text encoder and tokenizer against transformers' own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdcli.encoders.clip import ClipTextConfig, ClipTextEncoder, ProjectedClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.io.files import PACKAGE

TOKENIZERS = {"clip": PACKAGE / "encoders/clip_tokenizer", "starter": PACKAGE / "starter/tokenizer"}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_equal_transformers_bit_for_bit(hidden_act: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act=hidden_act,
    )
    oracle = CLIPTextModel(config).eval().to(dtype)
    network = ClipTextEncoder(ClipTextConfig.from_dict(config.to_dict())).to(dtype)
    network.load_state_dict(oracle.state_dict())
    ids = torch.randint(0, 1000, (3, 77))
    with torch.inference_mode():
        expected = oracle(ids, output_hidden_states=True)
        assert torch.equal(network(ids), expected.last_hidden_state)
        for found, hidden in zip(network.hidden_states(ids), expected.hidden_states, strict=True):
            assert torch.equal(found, hidden)


@pytest.mark.parametrize("end", [2, 999], ids=["old configuration", "end token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pooled_projection_equals_transformers_bit_for_bit(dtype: torch.dtype, end: int) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = CLIPTextConfig(**shape, num_attention_heads=4, hidden_act="gelu", projection_dim=48, eos_token_id=end)
    oracle = CLIPTextModelWithProjection(config).eval().to(dtype)
    network = ProjectedClipTextEncoder(ClipTextConfig.from_dict(config.to_dict()), projection_dim=48).to(dtype)
    network.load_state_dict({name.removeprefix("text_model."): t for name, t in oracle.state_dict().items()})
    ids = torch.randint(0, 999, (3, 77))
    for row, place in enumerate((5, 40, 76)):
        ids[row, place:] = 999
    with torch.inference_mode():
        expected = oracle(ids, output_hidden_states=True)
        states = network.hidden_states(ids)
        assert torch.equal(network.pooled(states[-1], ids), expected.text_embeds)
        assert torch.equal(states[-2], expected.hidden_states[-2])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200)
@given(text=st.text(max_size=300))
def test_token_ids_equal_transformers(name: str, text: str) -> None:
    oracle = _oracle(name)
    expected = oracle(text, padding="max_length", max_length=oracle.model_max_length, truncation=True).input_ids
    assert list(_tokenizer(name)(text).ids) == expected


def test_a_vocabulary_with_merges_gives_the_same_ids_as_tokenizer_json(tmp_path: Path) -> None:
    oracle = _oracle("clip")
    backend = oracle.backend_tokenizer
    backend.model.save(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a photo of a cat", "it's 12 o'clock!!", "naïve café — 東京 🐎", "<|endoftext|> trick", ""):
        expected = oracle(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert list(tokenizer(text).ids) == expected


def test_what_does_not_fit_is_said_in_the_words_of_the_prompt() -> None:
    tokens = _tokenizer("clip")("word " * 75 + "Beyond The End")
    assert tokens.cut == "Beyond The End"
    assert tokens.count == 78
    assert len(tokens.ids) == 77
    assert _tokenizer("clip")("word " * 75).cut == ""


@cache
def _oracle(name: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZERS[name])


@cache
def _tokenizer(name: str) -> ClipTokenizer:
    return load_tokenizer(TOKENIZERS[name])
