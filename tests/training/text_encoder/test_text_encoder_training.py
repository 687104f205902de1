"""The text encoder's trainer: its losses, its samples, what it learns, and the files it leaves."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    RobertaConfig,
    RobertaModel,
)

from sdcli.encoders.clip import ClipTextConfig, ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.files import PACKAGE
from sdcli.training.config_files import settings_from
from sdcli.training.state.checkpoint import save_checkpoint
from sdcli.training.task import Draw, Task
from sdcli.training.text_encoder import teachers
from sdcli.training.text_encoder.caption_files import Captions
from sdcli.training.text_encoder.losses import info_nce, matching_positions
from sdcli.training.text_encoder.network import (
    copy_text_encoder,
    first_end,
    fit_config,
    new_text_encoder,
    write_text_encoder,
)
from sdcli.training.text_encoder.settings import TextSettings
from sdcli.training.text_encoder.task import LENGTH_STEP, TextEncoderTask, by_length, parse_objectives
from sdcli.training.text_encoder.teachers import (
    SentenceEncoder,
    StoredVectors,
    Teacher,
    TeacherVectors,
    open_teacher,
)
from sdcli.training.text_encoder.vocabulary import train_vocabulary

SMALL = ClipTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
COLOURS, ANIMALS, DOINGS = ("red", "blue", "green", "black"), ("fox", "hare", "owl", "cat"), ("sleeps", "jumps", "sits")
SYNONYMS = {"fox": "reynard", "hare": "rabbit", "owl": "bird", "cat": "kitten"}


def teacher_vectors(teacher: Teacher, texts: Sequence[str], *, cache: Path | None = None) -> Tensor:
    kept = TeacherVectors.of(teacher, cache)
    list(kept.compute(teacher, texts))
    return kept.vectors(texts)


def vector_bytes(texts: Sequence[str], vectors: Tensor) -> bytes:
    letters = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
    return save({"vectors": vectors, "texts": letters})


def captions(*, alternatives: bool = True) -> Captions:
    """A small grammar: 48 sentences, each with a paraphrase."""
    pairs = [
        (f"a {colour} {animal} {doing}", f"here {doing} the {SYNONYMS[animal]} that is {colour}")
        for colour in COLOURS
        for animal in ANIMALS
        for doing in DOINGS
    ]
    if not alternatives:
        return Captions(tuple(text for text, _ in pairs), tuple(range(len(pairs))))
    return Captions(tuple(text for pair in pairs for text in pair), tuple(n for n in range(len(pairs)) for _ in "ab"))


@cache
def tokenizer(max_length: int = 16) -> ClipTokenizer:
    return train_vocabulary(captions().texts * 2, size=600, max_length=max_length)


def random_vectors(count: int, width: int = 24) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(5)), dim=1)


def task(objectives: Mapping[Any, float], *, found: Captions | None = None, **more: Any) -> TextEncoderTask:
    found = found or captions()
    encoder = new_text_encoder(SMALL, tokenizer(), seed=0)
    vectors = random_vectors(len(found.texts)) if "distil" in objectives else None
    options = {"batch": 16, "seed": 3, "learning_rate": 1e-3, "vectors": vectors, "pretrained": "align" in objectives}
    options |= more
    return TextEncoderTask(found, tokenizer(), encoder, objectives, **options)


def end_states(work: TextEncoderTask) -> Tensor:
    """The encoder's states [n, D] at the end of every caption."""
    ids = torch.from_numpy(work.items.ids.astype(np.int64))
    return work.encoder(ids)[torch.arange(len(ids)), first_end(ids, work.tokenizer.end_id)]


def batch_of(work: TextEncoderTask, step: int = 0) -> dict[str, Any]:
    return work.collate([work.item(draw) for draw in work.draws(step)])


def train(work: TextEncoderTask, steps: int, *, lr: float = 3e-3) -> None:
    """Ten lines in place of the training loop."""
    parameters = [p for group in work.phases[0].groups for p in group["params"].values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = work.phases[0].loss(work.networks, batch_of(work, step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


# The objectives


def test_objectives_are_names_with_weights() -> None:
    assert parse_objectives([], teacher=True) == {"distil": 1.0}
    assert parse_objectives(["align:2"], teacher=False) == {"align": 2.0}
    assert parse_objectives(["distil", "align:0.2"], teacher=True) == {"distil": 1.0, "align": 0.2}


@pytest.mark.parametrize(
    ("names", "teacher", "sentence"),
    [
        (["distill"], True, "did you mean"),
        (["align:0"], False, "above 0"),
        (["align:much"], False, "above 0"),
        (["align:nan"], False, "above 0"),
        (["align", "align:2"], False, "twice"),
        (["distil"], False, "add --teacher"),
        (["align"], True, "no effect"),
        ([], False, "add --teacher .* or --model .* was removed"),
        (["lm:0.2"], False, "--objective lm was removed; use distil with a --teacher, or align with a --model"),
        (["contrastive"], False, "--objective contrastive was removed"),
        (["distil", "distil-word:0.5"], True, "--objective distil-word was removed"),
    ],
)
def test_objectives_that_cannot_be_are_refused(names: list[str], teacher: bool, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_objectives(names, teacher=teacher)


def test_a_settings_file_with_a_removed_objective_ends_with_a_sentence_that_names_the_others(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("command: train-text-encoder\nobjective: [contrastive, 'lm:0.2']\n")
    recorded = settings_from(TextSettings, {}, config=tmp_path / "settings.yaml")
    with pytest.raises(UsageError, match=r"--objective contrastive was removed; use distil .* or align"):
        parse_objectives(recorded.objective, teacher=False)


def test_a_task_that_cannot_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        task({"distil": 1.0}, batch=1)
    with pytest.raises(UsageError, match="need each other"):
        task({"distil": 1.0}, vectors=None)
    with pytest.raises(UsageError, match="break the sentences"):
        task({"align": 1.0}, word_dropout=0.1)
    with pytest.raises(UsageError, match="the states of its first one, and no image has two"):
        task({"align": 1.0}, found=captions(alternatives=False))
    with pytest.raises(UsageError, match="add --model"):
        task({"align": 1.0}, pretrained=False)
    with pytest.raises(UsageError, match="evenly"):
        new_text_encoder(ClipTextConfig(hidden_size=30, num_attention_heads=4), tokenizer(), seed=0)
    with pytest.raises(UsageError, match="no activation 'gellu'"):
        new_text_encoder(ClipTextConfig(hidden_act="gellu"), tokenizer(), seed=0)


def test_it_is_a_task_for_the_loop() -> None:
    work: Task = task({"distil": 1.0, "align": 0.2})
    assert list(work.networks) == ["text_encoder", "text_projection"]
    assert work.averaged == ("text_encoder", "text_projection")
    assert [group["name"] for group in work.phases[0].groups] == ["text_encoder", "text_projection"]


# The network


def test_random_weights_are_spread_as_transformers_spreads_them() -> None:
    config = ClipTextConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    ours = new_text_encoder(config, tokenizer(), seed=0).state_dict()
    shape = {name: getattr(fit_config(config, tokenizer()), name) for name in config.__dataclass_fields__}
    oracle = CLIPTextModel(CLIPTextConfig(**shape)).state_dict()
    assert set(ours) == set(oracle)
    for name, tensor in ours.items():
        if tensor.ndim == 2:
            assert float(tensor.std()) == pytest.approx(float(oracle[name].std()), rel=0.06), name
            assert abs(float(tensor.mean())) < 0.01
        else:
            assert torch.equal(tensor, oracle[name]), name


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (new_text_encoder(SMALL, tokenizer(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embeddings.token_embedding.weight"], other["embeddings.token_embedding.weight"])


def test_the_end_of_a_text_is_its_first_end_token_though_padding_is_the_same_token() -> None:
    assert tokenizer().pad_id == tokenizer().end_id
    ids = torch.tensor([tokenizer()(text).ids for text in ("a red fox", "owl", "", "a red fox " * 9)])
    assert first_end(ids, tokenizer().end_id).tolist() == [4, 2, 1, 15]


# The losses


def test_info_nce_is_its_definition() -> None:
    rows, columns = random_vectors(6)[:3].double(), random_vectors(6)[3:].double()
    groups = torch.tensor([0, 1, 0])
    found = info_nce(rows, columns, alike=groups[:, None] == groups[None], temperature=0.1)
    scores = (rows @ columns.T / 0.1).exp()
    for i in range(3):
        others = [j for j in range(3) if j == i or groups[j] != groups[i]]
        there = -math.log(float(scores[i, i] / scores[i, others].sum()))
        back = -math.log(float(scores[i, i] / scores[others, i].sum()))
        assert float(found[i]) == pytest.approx((there + back) / 2)


@pytest.mark.parametrize("objectives", [{"distil": 1.0}, {"align": 1.0}, {"distil": 1.0, "align": 2.0}])
def test_gradients_reach_every_parameter(objectives: dict[str, float]) -> None:
    work = task(objectives)
    work.phases[0].loss(work.networks, batch_of(work)).loss.backward()
    trained = {f"{group['name']}.{name}": p for group in work.phases[0].groups for name, p in group["params"].items()}
    assert len(trained) == sum(len(list(network.parameters())) for network in work.networks.values())
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        if not name.endswith("k_proj.bias"):  # softmax does not feel what is added to all keys alike
            assert parameter.grad.abs().max() > 0, name


def test_a_sum_of_objectives_is_their_weighted_sum() -> None:
    work = task({"align": 2.0, "distil": 0.5})
    losses = work.loss(work.networks, batch_of(work))
    shown = losses.figures
    assert set(shown) == {"align", "distil", "cosine"}
    assert shown["align"] > 0
    assert float(losses.loss.detach()) == pytest.approx(float(2 * shown["align"] + 0.5 * shown["distil"]))
    assert not any(figure.requires_grad for figure in shown.values())


def test_cutting_a_batch_behind_its_longest_caption_changes_no_loss() -> None:
    work = task({"distil": 1.0})
    items = [work.item(draw) for draw in work.draws(0)]
    batch = work.collate(items)
    assert batch["token_ids"].shape[1] < tokenizer().max_length + 1
    full = {**batch, **{name: torch.stack([item[name] for item in items]) for name in ("token_ids",)}}
    assert float(work.loss(work.networks, batch).loss.detach()) == pytest.approx(
        float(work.loss(work.networks, full).loss.detach()), rel=1e-5
    )
    short = task({"distil": 1.0}, found=Captions(("owl", "fox", "cat"), (0, 1, 2)))
    assert batch_of(short)["token_ids"].shape == (16, LENGTH_STEP)


def test_equal_captions_are_not_negatives_of_each_other() -> None:
    found = Captions(("a fox", "a red fox", "a fox", "one fox"), (0, 0, 1, 1))
    work = task({"distil": 1.0}, found=found, validation_split=0.0, infonce_weight=1.0)
    equal = work.loss(work.networks, work.collate([work.item(Draw(0, 0)), work.item(Draw(1, 2))]))
    assert float(equal.loss.detach()) == pytest.approx(1 - float(equal.figures["cosine"]), abs=1e-6)
    other = work.loss(work.networks, work.collate([work.item(Draw(0, 0)), work.item(Draw(1, 1))]))
    assert float(other.loss.detach()) > 1 - float(other.figures["cosine"]) + 0.01


# Samples


def test_a_sample_is_a_pure_function_of_its_draw() -> None:
    options: dict[str, Any] = {"word_dropout": 0.3}
    work, again = task({"distil": 1.0}, **options), task({"distil": 1.0}, **options)
    draws = [draw for step in range(6) for draw in work.draws(step)]
    assert draws == [draw for step in range(6) for draw in again.draws(step)]
    assert [draw.counter for draw in draws] == list(range(96))
    items = [work.item(draw) for draw in draws]
    for draw, item in reversed(list(zip(draws, items, strict=True))):
        other = pickle.loads(pickle.dumps(again)).item(draw) if draw.counter == 5 else again.item(draw)
        assert item.keys() == other.keys()
        assert all(torch.equal(item[name], other[name]) for name in item)
    assert len({tuple(item["token_ids"].tolist()) for item in items}) > 92  # words are left out differently each time
    assert {item["token_ids"].dtype for item in items} == {torch.int64}
    assert {tuple(item["token_ids"].shape) for item in items} == {(16,)}


@settings(max_examples=60)
@given(
    text=st.lists(st.sampled_from(["a", "red", "fox", "zebrafish", "o'clock", "東京", "!"]), max_size=20).map(" ".join),
    counter=st.integers(0, 999),
)
def test_word_dropout_leaves_out_whole_words_and_never_all(text: str, counter: int) -> None:
    text = text or "a"
    work = task(
        {"distil": 1.0}, found=Captions((text, "a cat", "x"), (0, 0, 1)), word_dropout=0.5, validation_split=0.0
    )
    ids = work.item(Draw(counter, 0))["token_ids"].tolist()
    end, start = tokenizer().end_id, tokenizer().start_id
    whole = list(tokenizer()(text).ids)
    kept, words = _words(ids[1 : ids.index(end)]), _words(whole[1 : whole.index(end)])
    assert ids[0] == start
    assert set(ids[ids.index(end) :]) == {end}
    assert len(ids) == 16
    assert 0 < len(kept) <= len(words)
    remaining = iter(words)
    assert all(word in remaining for word in kept), "in the same order"


def _words(ids: list[int]) -> list[tuple[int, ...]]:
    words, word = [], []
    for number in ids:
        word.append(number)
        if tokenizer().tokenizer.id_to_token(number).endswith("</w>"):
            words.append(tuple(word))
            word = []
    return [*words, tuple(word)] if word else words


def test_alternatives_of_a_held_out_caption_are_not_trained_on() -> None:
    work = task({"distil": 1.0}, validation_split=0.25)
    trained = {draw.index for step in range(20) for draw in work.draws(step)}
    assert len(work.held_out) == 24
    groups = work.items.groups
    assert not set(groups[list(trained)]) & set(groups[work.held_out])
    assert len(trained) == 72 == len(work.order)
    assert task({"distil": 1.0}, validation_split=0.0).validate({}) == {}


# Learning


@given(
    tokens=st.lists(st.integers(3, 32), min_size=1, max_size=80),
    fewest=st.integers(1, 20),
)
def test_every_caption_is_in_the_bucket_of_its_length_or_of_a_longer_one(tokens: list[int], fewest: int) -> None:
    indices = np.arange(len(tokens)) * 3
    buckets = by_length(indices, np.array(tokens), min_count=fewest)
    assert sorted(np.concatenate(list(buckets.values())).tolist()) == indices.tolist(), "each once"
    assert all(len(found) >= min(fewest, len(tokens)) for found in buckets.values())
    longest = max(size[0] for size in buckets if size is not None)
    for size, found in buckets.items():
        assert size is not None
        for index in found:
            own = -(-tokens[index // 3] // 4) * 4
            assert own <= size[0] or size[0] == longest, "only the last ones may find no longer bucket"
            if own < size[0]:
                assert sum(-(-t // 4) * 4 == own for t in tokens) < fewest, "it had too few of its kind"


@pytest.mark.slow
def test_distillation_learns_a_teachers_vectors() -> None:
    work = task({"distil": 1.0}, found=captions(alternatives=False), batch=43, validation_split=0.1)
    train(work, 250)
    batch = batch_of(work)
    assert float(work.loss(work.networks, batch).figures["cosine"]) > 0.9
    figures = work.validate(work.networks)
    assert set(figures) == {"loss", "cosine", "retrieval"}


@pytest.mark.slow
def test_aligned_captions_take_on_the_states_of_the_first_one_and_it_keeps_them() -> None:
    pairs = [(f"a {c} {a} {d}", f"a {c} {SYNONYMS[a]} {d}") for c in COLOURS for a in ANIMALS for d in DOINGS]
    found = Captions(tuple(text for pair in pairs for text in pair), tuple(n for n in range(len(pairs)) for _ in "ab"))
    work = task({"align": 1.0}, found=found, batch=48, validation_split=0.2)
    firsts, others = (torch.from_numpy(work.items.ids[part::2].astype(np.int64)) for part in (0, 1))
    with torch.no_grad():
        wanted = work.encoder(firsts).clone()
    before = work.validate(work.networks)["loss"]
    train(work, 200)
    with torch.no_grad():
        kept, taken = (work.encoder(ids) for ids in (firsts, others))

    def apart(states: Tensor, ids: Tensor, places: slice) -> float:
        """Relative, over the last places of the text, or in the padding: all texts have the same words from the end."""
        ends = first_end(ids, tokenizer().end_id)[:, None]
        rows = torch.arange(len(ids))[:, None]
        at = ends + torch.arange(-2, 4)[None, places]
        like = first_end(firsts, tokenizer().end_id)[:, None] + torch.arange(-2, 4)[None, places]
        return float((states[rows, at] - wanted[rows, like]).square().sum() / wanted[rows, like].square().sum())

    assert work.validate(work.networks)["loss"] < before / 5
    for places in (slice(0, 3), slice(3, None)):  # the word, what it does and the end; padding
        assert apart(kept, firsts, places) < 0.05
        assert apart(taken, others, places) < 0.05


def test_what_is_said_in_the_same_words_is_aligned_already() -> None:
    work = task({"align": 1.0})
    firsts = [index for index in work.trained.tolist() if index % 2 == 0]
    batch = work.collate([work.item(Draw(counter, index)) for counter, index in enumerate(firsts)])
    assert float(work.loss(work.networks, batch).loss.detach()) == 0


@given(st.lists(st.integers(1, 5), max_size=5), st.lists(st.integers(1, 5), max_size=5), st.lists(st.integers(1, 5)))
def test_words_before_and_behind_another_word_are_at_their_own_places(
    before: list[int], word: list[int], behind: list[int]
) -> None:
    start, end, known, length = 8, 9, [6, 7], 40
    behind = behind[:10]

    def padded(words: list[int]) -> Tensor:
        ids = [start, *before, *words, *behind, end]
        return torch.tensor(ids + [end] * (length - len(ids)))

    places = matching_positions(padded(word), padded(known), end_id=end).tolist()
    first = len(before) + 1
    assert places[:first] == list(range(first))
    said = range(first, first + len(word))
    assert [places[place] for place in said] == [max(place - len(word) + 2, first - 1) for place in said]
    after = first + len(word)
    assert places[after:] == [min(place - len(word) + 2, length - 1) for place in range(after, length)]
    assert matching_positions(padded(word), padded(word), end_id=end).tolist() == list(range(length))


def test_validation_is_the_same_each_time_and_moves_nothing() -> None:
    work = task({"distil": 1.0, "align": 1.0}, validation_split=0.3)
    before = {name: tensor.clone() for name, tensor in work.encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert work.validate(work.networks) == work.validate(work.networks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in work.encoder.state_dict().items())


def test_an_encoder_that_knows_the_teacher_by_heart_retrieves_every_caption() -> None:
    work = task({"distil": 1.0}, validation_split=0.3)
    with torch.no_grad():
        states = end_states(work)
        work.items.vectors.copy_(F.normalize(work.networks["text_projection"](states), dim=1))  # type: ignore[union-attr]
    figures = work.validate(work.networks)
    assert figures["retrieval"] == 1
    assert figures["cosine"] == pytest.approx(1, abs=1e-5)


def test_the_projection_of_an_encoder_that_goes_on_is_the_best_linear_one() -> None:
    found = captions(alternatives=False)
    secret = torch.randn(24, SMALL.hidden_size, generator=torch.Generator().manual_seed(6))
    probe = task({"distil": 1.0}, found=found)
    with torch.no_grad():
        states = end_states(probe)
    vectors = F.normalize(states @ secret.T, dim=1)
    fresh, fitted = (
        task({"distil": 1.0}, found=found, vectors=vectors, pretrained=going_on) for going_on in (False, True)
    )
    assert fitted.validate(fitted.networks)["cosine"] > 0.99 > fresh.validate(fresh.networks)["cosine"]
    assert all(
        torch.equal(tensor, fitted.encoder.state_dict()[name]) for name, tensor in fresh.encoder.state_dict().items()
    )


# Files


def test_transformers_loads_what_was_saved_and_computes_the_same(tmp_path: Path) -> None:
    work = task({"distil": 1.0})
    train(work, 2)
    averages = {"text_encoder": copy.deepcopy(work.encoder).requires_grad_(False)}

    def save(inside: Path) -> None:
        work.save(inside, work.networks, averages)

    mask = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path, 2, save, facts={}, keep=None)
    finally:
        os.umask(mask)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert [name for name in files if "/" in name] == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_ema/config.json",
        "text_encoder_ema/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
    ]
    assert {oct((folder / name).stat().st_mode & 0o777) for name in files} == {"0o640"}
    oracle, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert (oracle.config.bos_token_id, oracle.config.eos_token_id) == (words.bos_token_id, words.eos_token_id)
    texts = ["a red fox sleeps", "", "owl", "here sits the bird " * 9]
    ids = words(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs, ours = oracle.eval()(ids), work.encoder(ids)
    assert torch.equal(theirs.last_hidden_state, ours)
    ends = first_end(ids, work.tokenizer.end_id)
    assert torch.equal(theirs.pooler_output, ours[torch.arange(len(ids)), ends])
    assert ids.tolist() == [list(load_tokenizer(folder / "tokenizer")(text).ids) for text in texts]


def test_a_text_encoder_trained_on_starts_as_it_was(tmp_path: Path) -> None:
    folder = PACKAGE / "starter"
    config = ClipTextConfig.from_dict(json.loads((folder / "text_encoder" / "config.json").read_text()))
    words = load_tokenizer(folder / "tokenizer")
    oracle = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    loaded = ClipTextEncoder(config).half()
    loaded.load_state_dict(oracle.state_dict())
    encoder = copy_text_encoder(loaded, words)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in encoder.parameters())
    write_text_encoder(tmp_path, encoder, encoder.state_dict())
    again = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([words("an astronaut riding a horse").ids])
    with torch.no_grad():
        assert torch.equal(again(ids).pooler_output, oracle(ids).pooler_output)
        ends = first_end(ids, words.end_id)
        assert torch.equal(encoder(ids)[0, ends], oracle(ids).pooler_output)
    found = Captions(("a fox", "an owl", "a cat"), (0, 1, 2))
    options: dict[str, Any] = {"batch": 2, "seed": 0, "learning_rate": 1e-4, "vectors": random_vectors(3)}
    work = TextEncoderTask(found, words, encoder, {"distil": 1.0}, **options)
    work.loss(work.networks, batch_of(work)).loss.backward()
    with pytest.raises(UsageError, match="its tokenizer gives"):
        copy_text_encoder(new_text_encoder(SMALL, tokenizer(), seed=0), words)


def test_the_sample_sheet_shows_the_nearest_captions(tmp_path: Path) -> None:
    work = task({"distil": 1.0})
    (path,) = work.samples(work.networks, 40, tmp_path / "samples")
    assert path == tmp_path / "samples" / "nearest-40.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if not line.startswith("  ")]
    assert set(asked) <= {captions().texts[index] for index in work.held_out}
    for number, line in enumerate(lines):
        if line.startswith("  "):
            assert line.split("  ")[2] in captions().texts
        else:
            scores = [float(near.split()[0]) for near in lines[number + 1 : number + 6]]
            assert scores == sorted(scores, reverse=True)
            assert line not in [near.split("  ")[2] for near in lines[number + 1 : number + 6]]
    single = task({"distil": 1.0}, found=Captions(("owl",), (0,)))
    assert single.samples(single.networks, 1, tmp_path)[0].read_text() == "owl\n"


# Teachers


def sentence_encoder(folder: Path, *, kind: str = "bert", pooling: str | None = None) -> Any:
    """A random teacher in the layout of all-MiniLM-L6-v2; returns transformers' network."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
        "pad_token_id": 1,
    }
    network = BertModel(BertConfig(**shape)) if kind == "bert" else RobertaModel(RobertaConfig(**shape))
    network.save_pretrained(folder)
    names = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    words = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 0))
    words.save(str(folder / "tokenizer.json"))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return network.eval()


def expected_vector(network: Any, folder: Path, text: str, *, limit: int, first: bool = False) -> Tensor:
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    ids = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
    with torch.no_grad():
        hidden = network(torch.tensor([ids])).last_hidden_state[0]
    return F.normalize(hidden[0] if first else hidden.mean(dim=0), dim=0)


@pytest.mark.parametrize(
    ("kind", "pooling", "limit"), [("bert", None, 12), ("bert", "cls_token", 12), ("roberta", "mean_tokens", 10)]
)
def test_a_sentence_encoder_pools_without_its_padding(
    tmp_path: Path, kind: str, pooling: str | None, limit: int
) -> None:
    network = sentence_encoder(tmp_path, kind=kind, pooling=pooling)
    state = torch.get_rng_state()
    teacher = open_teacher(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    texts = ["a", "abc", "a long sentence of letters", "zz"]
    found = teacher(texts)
    assert found.shape == (4, 24)
    for row, text in zip(found, texts, strict=True):
        expected = expected_vector(network, tmp_path, text, limit=limit, first=pooling == "cls_token")
        assert torch.allclose(row, expected, atol=1e-6), text


def test_a_teachers_name_changes_with_its_files(tmp_path: Path) -> None:
    sentence_encoder(tmp_path)
    first = open_teacher(tmp_path).identity
    assert open_teacher(tmp_path).identity == first
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    assert open_teacher(tmp_path).identity != first


def test_a_teacher_that_cannot_be_trusted_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or folder"):
        open_teacher(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"config\.json"):
        open_teacher(tmp_path)
    sentence_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(error: type[Exception], sentence: str, **changes: str | bytes) -> None:
        folder = tmp_path.parent / f"{tmp_path.name}-changed"
        folder.mkdir()
        for path in (path for path in tmp_path.iterdir() if path.is_file()):
            (folder / path.name).write_bytes(path.read_bytes())
        for name, content in changes.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(error, match=sentence):
            open_teacher(folder)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    refused(UsageError, "model of type 'gpt2'", config__json=json.dumps({**config, "model_type": "gpt2"}))
    refused(
        UsageError, "model of type 'x'", config__json=json.dumps({"model_type": "x", "auto_map": {"AutoModel": "a.B"}})
    )
    refused(BadWeights, "shape", config__json=json.dumps({**config, "hidden_size": 32}))
    refused(BadWeights, "does not describe a BertModel", config__json=json.dumps({**config, "hidden_size": "wide"}))
    refused(BadWeights, "has the padding token 999", config__json=json.dumps({**config, "pad_token_id": 999}))
    refused(BadWeights, "cut short", model__safetensors=(tmp_path / "model.safetensors").read_bytes()[:-9])
    refused(BadWeights, "not a tokenizer", tokenizer__json="{}")
    refused(UsageError, "Dense", modules__json=json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadWeights, match="is a pickle"):
        open_teacher(tmp_path)


def test_a_teacher_that_lacks_weights_is_refused_but_needs_no_pooler(tmp_path: Path) -> None:
    network = sentence_encoder(tmp_path)
    tensors = {
        f"bert.{name}": tensor for name, tensor in network.state_dict().items() if not name.startswith("pooler.")
    }
    save_file({**tensors, "cls.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    expected = expected_vector(network, tmp_path, "abc", limit=12)
    assert torch.allclose(open_teacher(tmp_path)(["abc"])[0], expected, atol=1e-6)
    tensors.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadWeights, match="lacks 1 of"):
        open_teacher(tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_vectors_in_a_file_are_looked_up_by_text(tmp_path: Path, suffix: str) -> None:
    path, texts, vectors = tmp_path / f"vectors{suffix}", ["a fox", "東京", "an owl"], random_vectors(3) * 7
    if suffix == ".npz":
        np.savez(path, texts=np.array(texts), vectors=vectors.numpy().astype(np.float64))
    else:
        path.write_bytes(vector_bytes(texts, vectors))
    teacher = open_teacher(path)
    assert torch.allclose(teacher(["an owl", "a fox"]), random_vectors(3)[[2, 0]])
    assert teacher_vectors(teacher, texts, cache=tmp_path / "cache").shape == (3, 24)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="no vector for 1 of 2 texts, first 'a hare'"):
        teacher(["a fox", "a hare"])


def test_a_file_of_vectors_that_is_none_is_refused(tmp_path: Path) -> None:
    def refused(name: str, sentence: str, **arrays: Any) -> None:
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(BadWeights, match=sentence):
            StoredVectors.load(tmp_path / name)

    refused("a.npz", "holds no arrays", vectors=np.zeros((1, 2)))
    refused("b.npz", "cannot be read", texts=np.array(["a", None], dtype=object), vectors=np.ones((2, 2)))
    refused("c.npz", "one vector per text", texts=np.array(["a"]), vectors=np.ones((2, 2)))
    refused("d.npz", "not finite", texts=np.array(["a"]), vectors=np.full((1, 2), np.nan))
    refused("e.npz", "zero", texts=np.array(["a"]), vectors=np.zeros((1, 2)))
    refused("f.npz", "should hold", texts=np.array([1]), vectors=np.ones((1, 2)))
    (tmp_path / "g.safetensors").write_bytes(vector_bytes(["a"], torch.ones(1, 2))[:-3])
    with pytest.raises(BadWeights, match="cut short"):
        open_teacher(tmp_path / "g.safetensors")
    with pytest.raises(UsageError, match=r"a \.safetensors or an \.npz"):
        open_teacher(Path(__file__))


class Counting:
    """A teacher that says how often it was asked."""

    identity = "sha256:0"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Any) -> Tensor:
        self.asked += texts
        return F.normalize(torch.tensor([[len(text), 1.0 + text.count("a"), 1.0] for text in texts]), dim=1)


def test_vectors_are_computed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "BATCH", 2)
    monkeypatch.setattr(teachers, "TEXTS_PER_FILE", 4)
    texts = [f"{'a' * n} {n}" for n in range(9)] * 2
    first, second, third = Counting(), Counting(), Counting()
    vectors = teacher_vectors(first, texts, cache=tmp_path)
    assert sorted(first.asked) == sorted(set(texts))
    assert torch.equal(vectors, Counting()(texts))
    assert torch.equal(teacher_vectors(second, [*texts, "new"], cache=tmp_path)[:-1], vectors)
    assert second.asked == ["new"]
    third.identity = "sha256:1"
    teacher_vectors(third, texts, cache=tmp_path)
    assert len(third.asked) == 9


def test_learning_from_a_teacher_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "BATCH", 2)
    monkeypatch.setattr(teachers, "TEXTS_PER_FILE", 4)
    texts = [f"{'a' * n} {n}" for n in range(10)]
    teacher = Counting()
    progress = TeacherVectors.of(teacher, tmp_path).compute(teacher, texts)
    assert [next(progress) for _ in range(4)] == [(2, 10), (4, 10), (6, 10), (8, 10)]
    del progress
    again = Counting()
    kept = TeacherVectors.of(again, tmp_path)
    assert list(kept.compute(again, texts))[-1] == (6, 6)
    assert torch.equal(kept.vectors(texts), Counting()(texts))


def test_a_damaged_file_of_the_cache_is_computed_again(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(5)]
    vectors = teacher_vectors(Counting(), texts, cache=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    good, rng = file.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(good[:8], "little")  # of the vectors
    nan = good[:start] + b"\0\0\xc0\x7f" + good[start + 4 :]
    damages = [good[:-4], b"", good[:100], nan, rng.randbytes(200)]
    for damaged in damages:
        file.write_bytes(damaged)
        teacher = Counting()
        kept = TeacherVectors.of(teacher, tmp_path)
        assert kept.broken == [file]
        for _ in kept.compute(teacher, texts):
            pass
        assert len(teacher.asked) == 5
        assert torch.equal(kept.vectors(texts), vectors)
        assert file.read_bytes() == good


def test_a_teacher_folder_and_its_stored_vectors_teach_the_same(tmp_path: Path) -> None:
    sentence_encoder(tmp_path / "teacher")
    teacher = open_teacher(tmp_path / "teacher")
    assert isinstance(teacher, SentenceEncoder)
    texts = captions().texts
    vectors = teacher_vectors(teacher, texts, cache=tmp_path / "cache")
    (tmp_path / "vectors.safetensors").write_bytes(vector_bytes(texts, vectors))
    stored = teacher_vectors(open_teacher(tmp_path / "vectors.safetensors"), texts)
    assert torch.allclose(stored, vectors, atol=1e-6)
