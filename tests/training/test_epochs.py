"""Buckets and epochs: small buckets are merged, every image has its turn, and `dataset check` says it before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdcli.cli.dataset import app
from sdcli.data.buckets import Bucketing, Size, bucket_fills, bucket_sizes, merged_buckets
from sdcli.data.records import ImageSet, Item
from sdcli.errors import UsageError
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.events import RunNote
from sdcli.training.inputs.feed import Share
from sdcli.training.inputs.image_data import ImageData, training_images
from sdcli.training.settings import ImageSettings
from sdcli.training.state.checkpoint import CheckpointInfo
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from tests.data.test_dataset_folders import folder_of, image_bytes
from tests.training_runs import QUICK, fresh_accelerator

CASES = Path(__file__).parent.parent / "cases" / "training"
BUCKETS = Bucketing(bucket_sizes((512, 512)))


@dataclass(frozen=True)
class Listed:
    """Images of which only the classes and repeats are known."""

    items: Sequence[Item]
    kind: str = "pictures"
    streamed: bool = False
    shuffle_window: int | None = None

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Plan:
    """A set of images in buckets, and the steps that it is trained in."""

    data: ImageData
    sizes: list[Size]
    micro: int
    accumulation: int
    processes: int

    @property
    def batch(self) -> int:
        return self.micro * self.accumulation * self.processes


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shapes = draw(st.lists(st.sampled_from(BUCKETS.buckets), min_size=1, max_size=8, unique=True))
    counts = draw(st.lists(st.integers(1, 25), min_size=len(shapes), max_size=len(shapes)))
    sizes = [shape for shape, count in zip(shapes, counts, strict=True) for _ in range(count)]
    often = draw(st.sampled_from([[1], [1], [1, 3], [10, 1, 2]]))
    items = [Item(str(number), ("x",), repeats=often[number % len(often)]) for number in range(len(sizes))]
    data = ImageData(
        images=cast(ImageSet, Listed(items)),
        bucketing=BUCKETS,
        trained=np.arange(len(sizes)),
        held_out=np.array([], dtype=np.int64),
        sizes=dict(enumerate(sizes)),
        originals=np.array(sizes),
        digests=tuple("" for _ in sizes),
        dropped=0,
    )
    return Plan(data, sizes, draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 3)))


def check_every_image_has_its_turn(plan: Plan, epochs: int) -> None:
    merged = plan.data.merged(plan.batch)
    order = merged.order(batch=plan.batch, seed=7, buffer=10)
    total = sum(item.repeats for item in cast(Listed, plan.data.images).items)
    assert len(order) == total
    steps = -(-epochs * total // plan.batch)
    seen: Counter[int] = Counter()
    for step in range(steps):
        draws = order.draws(step)
        shares = [
            Share(plan.micro, plan.accumulation, rank, plan.processes).of(draws) for rank in range(plan.processes)
        ]
        taken = [draw for share in shares for micro in share for draw in micro]
        assert sorted(draw.counter for draw in taken) == [draw.counter for draw in draws]  # each by one process, once
        assert len({draw.size for draw in draws}) == 1
        assert all(merged.sizes[draw.index] == draw.size for draw in draws)
        counts = Counter(draw.index for draw in draws)
        if total >= plan.batch:  # the end of one epoch and the beginning of the next
            assert all(count <= 2 * plan.data.images[index].repeats for index, count in counts.items())
        seen.update(counts)
    if total >= plan.batch:
        for index in range(len(plan.sizes)):
            repeats = plan.data.images[index].repeats
            assert (epochs - 1) * repeats <= seen[index] <= (epochs + 2) * repeats
            assert seen[index] or epochs < 2, "an image is never seen"


def check_the_check_says_what_the_trainer_does(plan: Plan) -> None:
    own = [plan.data.sizes[index] for index in range(len(plan.sizes))]
    fills = bucket_fills(plan.sizes, own, batch_size=plan.batch, repeats=plan.data.repeats())
    merged = plan.data.merged(plan.batch)
    assert {f"{fill.size[0]}x{fill.size[1]}": fill.images for fill in fills} == merged.buckets()
    assert sum(fill.merged for fill in fills) == sum(merged.sizes[i] != plan.data.sizes[i] for i in range(len(own)))
    for step in range(6):
        draws = merged.order(batch=plan.batch, seed=1, buffer=10).draws(step)
        fill = next(fill for fill in fills if fill.size == draws[0].size)
        if fill.repeats:
            assert len(fills) == 1  # only where all images together are fewer than a step
            assert len({draw.index for draw in draws}) < plan.batch


@settings(max_examples=80)
@given(plans(), st.integers(1, 4))
def test_every_image_has_its_turn_in_every_epoch(plan: Plan, epochs: int) -> None:
    check_every_image_has_its_turn(plan, epochs)


@settings(max_examples=80)
@given(plans())
def test_the_check_says_what_the_trainer_does(plan: Plan) -> None:
    check_the_check_says_what_the_trainer_does(plan)


@given(st.dictionaries(st.sampled_from(BUCKETS.buckets), st.integers(1, 40), min_size=1), st.integers(1, 50))
def test_buckets_are_merged_until_each_fills_a_step_and_no_further(counts: dict[Size, int], batch: int) -> None:
    into = merged_buckets(counts, batch)
    left: Counter[Size] = Counter()
    for size, target in into.items():
        left[target] += counts[size]
    assert into.keys() == counts.keys()
    assert all(into[target] == target for target in left)
    assert len(left) == 1 or min(left.values()) >= batch
    if min(counts.values()) >= batch:
        assert all(size == target for size, target in into.items())


@pytest.mark.slow
@settings(max_examples=400)
@given(plans(), st.integers(1, 4))
def test_hundreds_of_plans_give_every_image_its_turn(plan: Plan, epochs: int) -> None:
    check_every_image_has_its_turn(plan, epochs)


@pytest.mark.slow
@settings(max_examples=500)
@given(plans())
def test_hundreds_of_checks_say_what_the_trainer_does(plan: Plan) -> None:
    check_the_check_says_what_the_trainer_does(plan)


# Whole commands


def prepared(data: Path, run: Path, **changes: Any) -> tuple[UnetSession, list[str]]:
    """A run of `train-unet` before its first step, and its notes."""
    fresh_accelerator()
    values = {**QUICK, "cache_dir": run.parent / "cache", "resolution": "64", **changes}
    session = UnetSession(str(data), run, settings_from(UnetSettings, values), load_registry())
    with session:
        notes = [event.text for event in session.prepare(resume=False) if isinstance(event, RunNote)]
    return session, notes


@pytest.mark.slow
def test_the_case_of_small_buckets(tmp_path: Path) -> None:
    chosen = {"train_batch_size": 16, "enable_bucket": True, "resolution": "128", "bucket_reso_steps": 32}
    session, notes = prepared(CASES / "buckets", tmp_path / "run", **chosen, num_train_epochs=2.0)
    order = session.setup.task.order  # type: ignore[attr-defined]
    steps = session.steps
    assert steps is not None
    seen = Counter(draw.index for step in range(steps) for draw in order.draws(step))
    assert len(seen) == 19  # one of 20 is held out
    assert max(max(Counter(draw.index for draw in order.draws(step)).values()) for step in range(steps)) <= 2
    assert any("are in buckets of fewer samples than the 16 of a step" in note for note in notes)
    options = ("--resolution", "128", "--bucket-reso-steps", "32", "--train-batch-size", "16", "--json")
    found = json.loads(CliRunner().invoke(app, ["check", str(CASES / "buckets"), *options]).stdout)
    shown = {f"{row['width']}x{row['height']}": row["pictures"] for row in found["buckets"]}
    assert shown == session.setup.facts["buckets"]


@pytest.mark.slow
def test_fewer_images_than_a_step_are_told(tmp_path: Path) -> None:
    _, notes = prepared(CASES / "plain", tmp_path / "run", train_batch_size=16)
    assert any("a step of 16 samples repeats images, because there are only 8 of 64x64" in note for note in notes)


@pytest.mark.slow
def test_long_captions_are_told_and_counted(tmp_path: Path) -> None:
    _, notes = prepared(CASES / "long_captions", tmp_path / "run")
    (note,) = [note for note in notes if "captions have more than" in note]
    assert note.startswith("3 of 3 captions have more than the 75 tokens that the text encoder reads, and are cut (")
    assert "0.png, 1.png, 2.png" in note


def test_a_lone_folder_is_no_caption_for_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"4 of 4 images in .*lone_folder have no caption"):
        prepared(CASES / "lone_folder", tmp_path / "run")


@pytest.mark.slow
def test_kohyas_repeats_are_samples_of_an_epoch(tmp_path: Path) -> None:
    session, notes = prepared(CASES / "kohya_repeats", tmp_path / "run", validation_split=0.0)
    assert session.setup.samples == 2 * 10 + 5 * 1
    assert any("'10_zzq kettle' 10 times, '1_kettle' 1 times" in note for note in notes)
    assert session.setup.facts["sampling"] == {"repeats": 25}
    order = session.setup.task.order  # type: ignore[attr-defined]
    draws = Counter(draw.index for step in range(2 * 25 // 2) for draw in order.draws(step))
    assert sorted(draws.values()) == [2] * 5 + [20] * 2


def test_a_limit_of_samples_is_drawn_by_the_seed_from_all_classes() -> None:
    items = [Item(str(number), ("x",), label="abc"[min(number // 10, 2)]) for number in range(60)]
    images = cast(ImageSet, Listed(items))

    def drawn(limit: int, seed: int) -> list[int]:
        chosen = settings_from(ImageSettings, {"max_train_samples": limit, "seed": seed, "validation_split": 0.0})
        trained, held_out = training_images(images, np.arange(60), chosen)
        assert len(held_out) == 0
        return cast(list[int], trained.tolist())

    assert drawn(100, 0) == list(range(60))
    for seed in range(20):
        for limit in (3, 6, 12):
            taken = drawn(limit, seed)
            assert taken == sorted(set(taken))
            assert len(taken) == limit
            counts = Counter(items[index].label for index in taken)
            assert set(counts) == {"a", "b", "c"}
            assert counts["c"] >= max(counts["a"], counts["b"])
    assert len({tuple(drawn(6, seed)) for seed in range(20)}) == 20
    assert drawn(6, 3) == drawn(6, 3)


@pytest.mark.slow
def test_a_run_that_drew_its_samples_in_another_way_is_not_resumed(tmp_path: Path) -> None:
    """As of a version without merged buckets, whose checkpoints say nothing about samples."""
    files: dict[str, bytes | str] = {}
    for number in range(5):
        files |= {f"{number}.png": image_bytes(number, (64, 64) if number else (96, 40)), f"{number}.txt": "x"}
    data = folder_of(tmp_path / "data", files)
    session, _ = prepared(data, tmp_path / "run", enable_bucket=True, validation_split=0.0)
    facts = json.loads(json.dumps(session.setup.facts))
    assert list(facts["sampling"]) == ["merged_buckets"]
    same = CheckpointInfo(tmp_path / "run" / "checkpoint-1", 1, (), facts)
    session._check_same_data(same)
    del facts["sampling"]
    with pytest.raises(UsageError, match=r"would be drawn in another way than so far \(merged buckets\).*-m .*run"):
        session._check_same_data(same)
