"""The order of samples, and the counted randomness under it: laws that hold for every seed, size and step."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.io import rng
from sdcli.training.inputs.order import Order, Size, windowed_shuffle
from sdcli.training.task import Draw

SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Buckets of uneven sizes, small and large batches, with and without shards."""
    counts = draw(st.lists(st.integers(1, 13), min_size=1, max_size=4))
    total = sum(counts)
    indices = np.random.default_rng(draw(st.integers(0, 99))).permutation(total + 3)[:total]  # gaps, as after drops
    ends = np.cumsum(counts)
    sizes: list[Size] = [None] if len(counts) == 1 else [(64 + 8 * number, 64) for number in range(len(counts))]
    blocks = np.arange(total + 3) // draw(st.integers(1, 6)) if draw(st.booleans()) else None
    return Order(
        {size: indices[end - count : end] for size, count, end in zip(sizes, counts, ends, strict=True)},
        batch=draw(st.integers(1, 9)),
        seed=draw(SEEDS),
        blocks=blocks,
        buffer=draw(st.integers(1, 20)),
    )


def again(order: Order) -> Order:
    """The same order, without anything that it has remembered."""
    return Order(order.buckets, order.batch, order.seed, order.blocks, order.buffer)


def steps_of_rounds(order: Order, rounds: int) -> int:
    return sum(rounds * len(indices) // order.batch for indices in order.buckets.values())


# A step


@given(order=orders(), steps=st.integers(1, 30))
@settings(max_examples=80)
def test_a_step_is_one_bucket_and_counters_go_on_without_a_gap(order: Order, steps: int) -> None:
    draws = [order.draws(step) for step in range(steps)]
    assert [draw.counter for step in draws for draw in step] == list(range(steps * order.batch))
    for step in draws:
        assert len({draw.size for draw in step}) == 1
        assert {draw.index for draw in step} <= set(order.buckets[step[0].size].tolist())


@given(order=orders(), asked=st.lists(st.integers(0, 400), min_size=1, max_size=12))
@settings(max_examples=80)
def test_a_step_is_the_same_whatever_was_asked_before(order: Order, asked: list[int]) -> None:
    for step in asked:
        assert order.draws(step) == again(order).draws(step)


def test_steps_far_away_cost_as_little_as_the_first() -> None:
    order = Order({None: np.arange(1000)}, 7, seed=3)
    assert order.draws(10**12) == again(order).draws(10**12)
    assert order.draws(10**12)[0].counter == 7 * 10**12


def test_other_seeds_give_other_orders() -> None:
    firsts = {tuple(draw.index for draw in Order({None: np.arange(50)}, 10, seed).draws(0)) for seed in range(20)}
    assert len(firsts) == 20


def test_the_order_does_not_depend_on_how_the_buckets_were_listed() -> None:
    one: dict[Size, np.ndarray] = {(64, 64): np.arange(5), (96, 64): np.arange(5, 12), (64, 96): np.arange(12, 20)}
    other = dict(reversed(one.items()))
    for step in range(30):
        assert Order(one, 3, seed=1).draws(step) == Order(other, 3, seed=1).draws(step)


# Epochs and rounds


@given(order=orders(), epochs=st.integers(1, 4))
@settings(max_examples=80)
def test_every_epoch_of_a_bucket_takes_each_image_once(order: Order, epochs: int) -> None:
    rounds = epochs + order.batch  # enough for every bucket to have had that many epochs
    taken: dict[Size, list[int]] = {size: [] for size in order.buckets}
    for step in range(steps_of_rounds(order, rounds)):
        for draw in order.draws(step):
            taken[draw.size].append(draw.index)
    for size, indices in order.buckets.items():
        count = len(indices)
        for epoch in range(epochs):
            assert sorted(taken[size][epoch * count : (epoch + 1) * count]) == sorted(indices.tolist())


@given(order=orders(), rounds=st.integers(1, 12))
@settings(max_examples=80)
def test_after_k_rounds_a_bucket_of_n_has_had_floor_of_kn_over_batch_steps(order: Order, rounds: int) -> None:
    had = Counter(order.draws(step)[0].size for step in range(steps_of_rounds(order, rounds)))
    assert had == Counter({size: rounds * len(indices) // order.batch for size, indices in order.buckets.items()})


@given(order=orders(), rounds=st.integers(1, 6))
@settings(max_examples=60)
def test_no_image_is_ever_more_than_one_epoch_ahead_of_another_in_its_bucket(order: Order, rounds: int) -> None:
    seen: Counter[int] = Counter({int(index): 0 for indices in order.buckets.values() for index in indices})
    for step in range(steps_of_rounds(order, rounds)):
        seen.update(draw.index for draw in order.draws(step))
        for indices in order.buckets.values():
            counts = [seen[int(index)] for index in indices]
            assert max(counts) - min(counts) <= 1


def test_buckets_are_mixed_within_a_round() -> None:
    order = Order({(64, 64): np.arange(100), (96, 64): np.arange(100, 200)}, 4, seed=0)
    sizes = [order.draws(step)[0].size for step in range(50)]
    changes = sum(one != other for one, other in pairwise(sizes))
    assert 12 < changes < 38  # a fair coin gives 24.5 +- 3.5


def test_an_order_has_the_length_of_an_epoch() -> None:
    assert len(Order({(64, 64): np.arange(5), (96, 64): np.arange(5, 12)}, 4, seed=0)) == 12


def test_an_image_alone_fills_its_steps_again_and_again() -> None:
    order = Order({None: np.array([6])}, 3, seed=0)
    assert [order.draws(0), order.draws(1)] == [[Draw(3 * s + p, 6) for p in range(3)] for s in range(2)]


# Shards


@st.composite
def shards(draw: st.DrawFn) -> np.ndarray:
    """The shard of each item, in any numbering."""
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    names = draw(st.permutations(range(len(counts))))
    return np.repeat(names, counts)


@given(blocks=shards(), seed=SEEDS, epoch=st.integers(0, 1000), buffer=st.integers(0, 60))
@settings(max_examples=150)
def test_a_windowed_shuffle_takes_every_item_once_and_none_further_than_the_buffer(
    blocks: np.ndarray, seed: int, epoch: int, buffer: int
) -> None:
    read = windowed_shuffle(blocks, seed, epoch, "order", buffer=0)
    mixed = windowed_shuffle(blocks, seed, epoch, "order", buffer=buffer)
    assert sorted(mixed.tolist()) == list(range(len(blocks)))
    read_at, mixed_at = np.argsort(read), np.argsort(mixed)
    assert int(np.abs(mixed_at - read_at).max()) <= buffer


@given(blocks=shards(), seed=SEEDS, epoch=st.integers(0, 1000))
@settings(max_examples=100)
def test_shards_are_read_whole_one_after_the_other_and_from_front_to_back(
    blocks: np.ndarray, seed: int, epoch: int
) -> None:
    read = windowed_shuffle(blocks, seed, epoch, "order", buffer=0)
    changes = int((np.diff(blocks[read]) != 0).sum())
    assert changes == len(np.unique(blocks)) - 1
    for block in np.unique(blocks):
        assert read[blocks[read] == block].tolist() == np.flatnonzero(blocks == block).tolist()


def test_shards_are_visited_in_another_order_each_epoch() -> None:
    blocks = np.repeat(np.arange(12), 3)
    visits = {tuple(dict.fromkeys(blocks[windowed_shuffle(blocks, 0, e, "x", buffer=1)].tolist())) for e in range(20)}
    assert len(visits) == 20


def test_a_large_buffer_mixes_what_lies_side_by_side() -> None:
    blocks = np.zeros(2000, dtype=np.int64)
    mixed = windowed_shuffle(blocks, 0, 0, "x", buffer=500)
    neighbours = int((np.abs(np.diff(mixed)) == 1).sum())
    assert neighbours < 40


# Counted randomness


@given(size=st.integers(0, 200), seed=SEEDS, epoch=st.integers(0, 10**6))
@settings(max_examples=100)
def test_a_permutation_has_every_number_once_and_is_the_same_each_time(size: int, seed: int, epoch: int) -> None:
    one = rng.permutation(seed, epoch, "order", size)
    assert one.dtype == np.int64
    assert sorted(one.tolist()) == list(range(size))
    assert np.array_equal(one, rng.permutation(seed, epoch, "order", size))


def test_permutations_differ_between_epochs_seeds_and_purposes() -> None:
    drawn = [
        tuple(rng.permutation(seed, epoch, purpose, 30).tolist())
        for seed in range(8)
        for epoch in range(8)
        for purpose in ("order", "buckets")
    ]
    assert len(set(drawn)) == len(drawn)


@given(
    one=st.tuples(SEEDS, st.integers(0, 2**50), st.sampled_from(["flip", "crop", "1", "1:1"])),
    other=st.tuples(SEEDS, st.integers(0, 2**50), st.sampled_from(["flip", "crop", "1", "1:1"])),
)
@settings(max_examples=200)
def test_different_questions_have_different_keys(one: tuple[int, int, str], other: tuple[int, int, str]) -> None:
    assert (rng.key(*one) == rng.key(*other)) == (one == other)
    assert 0 <= rng.key(*one) < 2**63


def test_every_number_comes_to_every_place_equally_often() -> None:
    """Chi-square over (number, place): 49 degrees of freedom, as rows and columns sum to a constant."""
    size, drawn = 8, 8000
    table = np.zeros((size, size))
    for epoch in range(drawn):
        table[np.arange(size), rng.permutation(5, epoch, "order", size)] += 1
    expected = drawn / size
    chi_square = float(((table - expected) ** 2 / expected).sum()) * (size - 1) / size
    assert 23 < chi_square < 86  # 99.8% of fair ones lie between 23.9 and 85.4


def test_all_orders_of_four_come_equally_often() -> None:
    drawn = 12_000
    counts = Counter(tuple(rng.permutation(9, epoch, "order", 4).tolist()) for epoch in range(drawn))
    assert len(counts) == 24
    expected = drawn / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert 7.5 < chi_square < 49.8  # 23 degrees of freedom, 99.9%


def test_noise_is_standard_normal_and_independent_between_counters() -> None:
    noise = torch.stack([rng.noise(0, counter, "noise", (16, 16)) for counter in range(200)]).flatten(1)
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    correlations = torch.corrcoef(noise) - torch.eye(200)
    assert float(correlations.abs().max()) < 0.35  # 1/16 each, the largest of 20,000


# Pinned: a library that changes these would make every resumed run another run. Do not adapt the numbers lightly.


def test_keys_and_scalars_are_those_of_every_version() -> None:
    assert rng.key(0, 0, "noise") == 7936019389186638151
    assert rng.key(2**63 - 1, 10**12, "order (512, 512)") == 8338294798183744151
    draw = rng.scalars(7, 3, "caption")
    assert [draw.random(), draw.random()] == [0.1283493987502654, 0.9037807880271803]
    assert [draw.randrange(1000), draw.choice("abcdefgh")] == [199, "g"]


def test_permutations_are_those_of_every_version() -> None:
    assert rng.permutation(1, 2, "order", 10).tolist() == [9, 2, 8, 5, 1, 0, 6, 7, 3, 4]
    large = rng.permutation(1, 2, "order", 100_000)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == "cc675e61d25a963a"
    blocks = np.repeat(np.arange(4), 3)
    assert windowed_shuffle(blocks, 1, 2, "order", buffer=3).tolist() == [9, 11, 3, 10, 5, 4, 6, 7, 8, 0, 1, 2]


def test_noise_is_that_of_every_version() -> None:
    """From 16 numbers on torch fills blocks by another path than for fewer."""
    assert rng.noise(1, 2, "noise", (4,)).tolist() == pytest.approx(
        [-1.5578268, 1.4110955, -0.0889195, 1.3661145], abs=1e-6
    )
    assert rng.noise(1, 2, "noise", (4, 64, 64))[3, 63, 60:].tolist() == pytest.approx(
        [-2.620858, 0.9567944, -0.5924556, 0.0777556], abs=1e-6
    )


def test_draws_are_those_of_every_version() -> None:
    order = Order({(64, 64): np.arange(5), (96, 64): np.arange(5, 12)}, 2, seed=11)
    drawn = [[draw.index for draw in order.draws(step)] for step in (0, 1, 2, 1000)]
    assert drawn == [[0, 1], [7, 5], [11, 9], [3, 1]]
