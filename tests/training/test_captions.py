"""Captions and classes of samples: what is dropped, shuffled and wrapped, and that all of it is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.data.records import Item
from sdcli.training.inputs.captions import CaptionRules
from sdcli.training.inputs.conditioning import ClassConditioning, NoConditioning, TextConditioning
from sdcli.training.task import Draw

SEEDS = st.integers(0, 2**63 - 1)
WORDS = st.text("abcdé 一{}()", min_size=1, max_size=8).map(str.strip).filter(bool)
CAPTIONS = st.lists(st.lists(WORDS, min_size=1, max_size=6).map(", ".join), min_size=0, max_size=4)


class Images(list[Item]):
    """As much of an image set as conditions look at."""

    def __init__(self, captions: Sequence[tuple[str, ...]], labels: Sequence[str | None] = ()) -> None:
        super().__init__(
            Item(f"{number}.png", some, labels[number] if labels else None) for number, some in enumerate(captions)
        )


def texts_of(rules: CaptionRules, captions: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    return [rules.text(captions, seed=seed, counter=counter) for counter in range(count)]


# Dropout


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_empty_captions_is_the_one_asked_for(share: float) -> None:
    count = 20_000
    dropped = texts_of(CaptionRules(dropout=share), ("a cat", "a dog"), count).count("")
    assert abs(dropped / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_none_and_all_are_exact() -> None:
    assert "" not in texts_of(CaptionRules(dropout=0.0), ("a cat",), 5000)
    assert set(texts_of(CaptionRules(dropout=1.0, prefix="x ", template="<{prompt}>"), ("a cat",), 5000)) == {""}


def test_dropout_does_not_choose_among_alternatives() -> None:
    """Which caption a sample has is the same whether others are dropped or not."""
    plain, some = (texts_of(CaptionRules(dropout=share), ("a", "b", "c"), 2000) for share in (0.0, 0.4))
    assert all(one == other for one, other in zip(plain, some, strict=True) if other)


def test_a_dropped_caption_is_not_dropped_in_each_epoch() -> None:
    """An image that comes back with another counter is drawn for anew."""
    rules = CaptionRules(dropout=0.5)
    assert {rules.text(("a cat",), seed=0, counter=7 + 100 * epoch) for epoch in range(20)} == {"", "a cat"}


# Alternatives, shuffling, wrapping


def test_alternatives_all_occur_about_equally_often() -> None:
    counts = Counter(texts_of(CaptionRules(dropout=0.0), ("a", "b", "c", "d"), 8000))
    assert set(counts) == {"a", "b", "c", "d"}
    assert all(abs(count - 2000) < 4 * (8000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@given(captions=CAPTIONS, seed=SEEDS, counter=st.integers(0, 2**50), prefix=WORDS | st.just(""))
@settings(max_examples=150)
def test_all_texts_holds_whatever_a_sample_can_get(captions: list[str], seed: int, counter: int, prefix: str) -> None:
    rules = CaptionRules(dropout=0.3, prefix=prefix, template="{prompt}, glossy")
    every = rules.all_texts(captions)
    assert every is not None
    assert rules.text(captions, seed=seed, counter=counter) in every
    fixed = TextConditioning(Images([tuple(captions)]), rules, seed, tokenizers=(Recorder(),)).fixed(0)  # type: ignore[arg-type]
    assert Recorder.texts[-1] in every
    assert fixed["ids"].dtype == torch.int64


@given(
    parts=st.lists(WORDS.filter(lambda word: "," not in word), min_size=1, max_size=8),
    keep=st.integers(0, 9),
    seed=SEEDS,
    counter=st.integers(0, 2**50),
)
@settings(max_examples=150)
def test_shuffling_keeps_the_first_parts_and_loses_none(parts: list[str], keep: int, seed: int, counter: int) -> None:
    rules = CaptionRules(dropout=0.0, shuffle=True, keep=keep)
    shuffled = rules.text([",".join(parts)], seed=seed, counter=counter).split(", ")
    assert sorted(shuffled) == sorted(parts)
    assert shuffled[:keep] == parts[:keep]
    assert rules.all_texts([",".join(parts)]) is None


def test_shuffling_gives_every_order() -> None:
    rules = CaptionRules(dropout=0.0, shuffle=True, keep=1)
    assert set(texts_of(rules, ("style, a, b, c",), 500)) == {
        f"style, {one}, {two}, {three}"
        for one, two, three in ("abc", "acb", "bac", "bca", "cab", "cba")
    }  # fmt: skip


def test_prefix_and_template_wrap_every_caption_but_the_empty_one() -> None:
    rules = CaptionRules(dropout=0.2, prefix="sks ", template="{prompt}, icon of {prompt}")
    assert set(texts_of(rules, ("cat",), 200)) == {"", "sks cat, icon of sks cat"}
    assert rules.text((), seed=0, counter=0) == ""


def test_braces_in_a_caption_are_letters() -> None:
    rules = CaptionRules(dropout=0.0, template="{prompt}!")
    assert rules.text(("{prompt} {0} {}",), seed=0, counter=0) == "{prompt} {0} {}!"


@given(captions=CAPTIONS, seed=SEEDS, counters=st.lists(st.integers(0, 2**50), min_size=1, max_size=5))
@settings(max_examples=80)
def test_a_text_depends_on_seed_and_counter_alone(captions: list[str], seed: int, counters: list[int]) -> None:
    rules = CaptionRules(dropout=0.3, shuffle=True, keep=1)
    once = [rules.text(captions, seed=seed, counter=counter) for counter in counters]
    assert [rules.text(captions, seed=seed, counter=counter) for counter in reversed(counters)] == once[::-1]


def test_other_seeds_draw_other_captions() -> None:
    drawn = {tuple(texts_of(CaptionRules(), ("a", "b", "c"), 50, seed=seed)) for seed in range(20)}
    assert len(drawn) == 20


# Conditions


class Recorder:
    """A tokenizer that remembers what it was asked."""

    texts: list[str] = []  # noqa: RUF012  of all instances, as samples are asked for through values

    def __call__(self, text: str) -> Any:
        Recorder.texts.append(text)
        return SimpleNamespace(ids=[len(text), 1, 2])


class States(dict[str, dict[str, torch.Tensor]]):
    """Cached states, in half precision."""

    def __missing__(self, text: str) -> dict[str, torch.Tensor]:
        return {"hidden": torch.full((3, 2), float(len(text)), dtype=torch.bfloat16)}


def test_text_states_come_from_the_cache_in_float32() -> None:
    texts = TextConditioning(Images([("cat",)]), CaptionRules(dropout=0.0), 0, states=States())  # type: ignore[arg-type]
    hidden = texts.item(Draw(5, 0))["hidden"]
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, torch.full((3, 2), 3.0))
    assert torch.equal(texts.fixed(0)["hidden"], hidden)


def test_without_a_condition_every_text_is_empty() -> None:
    images = Images([("cat",), ()])
    texts = TextConditioning(images, CaptionRules(dropout=0.0, prefix="x "), 0, states=States(), ignored=True)  # type: ignore[arg-type]
    for hidden in (texts.item(Draw(0, 0))["hidden"], texts.fixed(0)["hidden"], texts.fixed(1)["hidden"]):
        assert torch.equal(hidden, torch.zeros(3, 2))
    assert NoConditioning().item(Draw(0, 0)) == NoConditioning().fixed(0) == {}


def labels(dropout: float) -> ClassConditioning:
    return ClassConditioning(Images([(), ()], ["dog", "cat"]), {"cat": 0, "dog": 1}, seed=4, dropout=dropout)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_samples_without_a_class_is_the_one_asked_for(share: float) -> None:
    given_labels = [int(labels(share).item(Draw(counter, 0))["label"]) for counter in range(10_000)]
    counts = Counter(given_labels)
    assert set(counts) == {1, 2}  # its own, and the one after the last for none
    assert abs(counts[2] / 10_000 - share) < 4 * (share * (1 - share) / 10_000) ** 0.5


def test_classes_are_numbers_and_never_dropped_in_validation() -> None:
    for dropout, expected in ((0.0, [1, 0]), (1.0, [2, 2])):
        condition = labels(dropout)
        assert [int(condition.item(Draw(9, index))["label"]) for index in (0, 1)] == expected
        assert [int(condition.fixed(index)["label"]) for index in (0, 1)] == [1, 0]
    assert labels(0.0).fixed(0)["label"].dtype == torch.int64


def test_captions_and_classes_of_a_counter_are_dropped_alike() -> None:
    """Both read the same counted number, so that switching from one to the other keeps the schedule of dropout."""
    rules = CaptionRules(dropout=0.3)
    for counter in range(200):
        dropped = rules.text(("cat",), seed=4, counter=counter) == ""
        assert dropped == (int(labels(0.3).item(Draw(counter, 0))["label"]) == 2)
