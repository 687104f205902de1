"""What divided and very long runs stand on: shards, plans made in parts, names, journals of several files."""

from __future__ import annotations

import gc
import hashlib
import random
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcli.errors import CannotWrite, UsageError
from sdcli.generation.filenames import check_distinct_names, name_of
from sdcli.generation.journal import Journal, entry_of
from sdcli.generation.plan import Batch, BatchPlaces, Limits, plan, plan_digest
from sdcli.generation.resolve.job_spool import JobSpool
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.run_shard import RunShard
from sdcli.generation.settings import OutputSettings
from sdcli.generation.writer import Writer
from sdcli.models.registry import Registry, load_registry
from sdcli.request.jobs import Line, Occurrences


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def jobs_of(registry: Registry, fields: Sequence[dict[str, Any]]) -> list[ResolvedJob]:
    lines = [
        Line(number, {"prompt": "a fox", "model": "tiny", "seed": 7, **some}) for number, some in enumerate(fields)
    ]
    found = list(expand(lines, {}, registry, num_images=1, base_seed=0))
    jobs = [job for job in found if isinstance(job, ResolvedJob)]
    assert len(jobs) == len(fields)
    return jobs


# Shards


@given(count=st.integers(1, 40), units=st.integers(0, 100))
def test_each_unit_is_in_exactly_one_shard_and_no_shard_has_two_more_than_another(count: int, units: int) -> None:
    parts = [list(RunShard(index, count).part(range(units))) for index in range(1, count + 1)]
    assert sorted(unit for part in parts for unit in part) == list(range(units))
    assert all(part == sorted(part) for part in parts)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "text", ["", "1", "1/", "/2", "3/2", "0/2", "-1/2", "1/0", "1.5/2", "a/b", "1/2/3", "1/9999999"]
)
def test_what_is_no_shard_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        RunShard.of(text)


def test_a_number_from_zero_is_told_to_count_from_one() -> None:
    with pytest.raises(UsageError, match="add 1"):
        RunShard.of("0/4")
    assert RunShard.of(" 4 / 4 ") == RunShard(4, 4)


# Jobs that are not in memory


ODD: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": "a (cat:1.3), [day:night:0.5]", "negative_prompt": "blur"},
    {"model": "starter", "steps": 3, "eta": 0.0, "scheduler": "ddim"},
    {"eta": -0.0, "scheduler": "ddim"},
    {"prompt_template": "{prompt}, a photo", "width": 32, "height": 32, "loras": ()},
    {"variation_strength": 0.25, "variation_seed": 5},
    {"custom_id": "seven", "steps": 2, "upscale": "2x"},
)


@given(chosen=st.lists(st.sampled_from(range(len(ODD))), max_size=30), templates=st.integers(1, 4))
@settings(max_examples=25)
def test_jobs_come_back_from_the_disk_as_they_were(chosen: list[int], templates: int) -> None:
    lines = [
        Line(number, {"prompt": f"a fox {number}", "model": "tiny", "seed": number, **ODD[kind]})
        for number, kind in enumerate(chosen)
    ]
    lines.insert(len(lines) // 2, Line(99, {}, "no such line"))
    jobs = list(expand(lines, {}, load_registry(), num_images=2, base_seed=0))
    with mock.patch("sdcli.generation.resolve.job_spool.TEMPLATES", templates):
        spool = JobSpool(iter(jobs))
    assert len(spool) == len(jobs) == 2 * len(chosen) + 1
    assert spool_in_use(spool[:]) == jobs == spool_in_use([spool[place] for place in range(-len(jobs), 0)])
    assert [job.index for job in spool.resolved()] == [job.index for job in jobs if isinstance(job, ResolvedJob)]
    good = spool.resolved(without=range(0, 100, 3))
    for job, found in zip([job for job in jobs if isinstance(job, ResolvedJob) and job.index % 3], good, strict=True):
        assert (found.request.key(), repr(found.request)) == (job.request.key(), repr(job.request))
        assert found.model is job.model
    for size in (1, 3):
        whole = plan(list(good), Limits(size))
        places = BatchPlaces(good, Limits(size))
        assert [tuple(good[place].index for place in some) for some in places] == list(map(indices, whole))
        assert places.models == len({job.request.model for job in good})


def spool_in_use(jobs: Sequence[ResolvedJob | BadJob]) -> Sequence[ResolvedJob | BadJob]:
    """The jobs when their prompts, which are parsed as they are needed, have been parsed."""
    return [job for job in jobs if isinstance(job, BadJob) or job.request.prompts]


def test_a_spool_of_jobs_holds_none_of_them(registry: Registry) -> None:
    """But for the requests that the others differ from."""

    def jobs() -> Iterator[ResolvedJob]:
        for job in jobs_of(registry, [{"seed": seed} for seed in range(300)]):
            alive.append(weakref.ref(job.request))
            yield job

    alive: list[Any] = []
    spool = JobSpool(jobs())
    assert len(spool) == 300
    gc.collect()
    assert sum(one() is not None for one in alive) <= 1


def test_a_full_disk_for_the_list_of_jobs_is_reported(registry: Registry) -> None:
    with (
        mock.patch("tempfile.TemporaryFile", side_effect=OSError(28, "No space left on device")),
        pytest.raises(CannotWrite, match=r"cannot write the list of jobs into .*: No space left on device"),
    ):
        JobSpool(jobs_of(registry, [{}]))


def test_batches_come_model_by_model_as_the_models_first_came(registry: Registry) -> None:
    models = ["tiny", "starter", "tiny", "starter", "tiny"]
    jobs = jobs_of(registry, [{"model": model, "seed": seed} for seed, model in enumerate(models)])
    assert [batch.jobs[0].request.model for batch in plan(jobs, Limits(1))] == ["tiny"] * 3 + ["starter"] * 2


def test_plans_have_one_digest_only_if_they_are_equal(registry: Registry) -> None:
    jobs = jobs_of(registry, [{"seed": seed} for seed in range(6)])
    digest = plan_digest(plan(jobs, Limits(2)))
    assert digest == plan_digest(plan(list(jobs), Limits(2)))
    others = [plan(jobs, Limits(3)), plan(jobs[:-1], Limits(2)), plan(jobs[::-1], Limits(2))]
    changed = [*jobs[:-1], *jobs_of(registry, [{"seed": 99}])]
    assert len({digest, *map(plan_digest, others), plan_digest(plan(changed, Limits(2)))}) == 5


def indices(batch: Batch) -> tuple[int, ...]:
    return tuple(job.index for job in batch.jobs)


# Names


@pytest.mark.parametrize(
    ("template", "distinct"),
    [
        ("{index:05}-{seed}-{prompt}", True),
        ("{index}", True),
        ("{index:03d}.png", True),
        ("{model}/{index}_{prompt}", True),
        ("{prompt}-{index}", True),
        ("{prompt}", False),
        ("{seed}", False),
        ("{index}{seed}", False),
        ("{index:.0e}-{seed}", False),
        ("{index}/{seed}", False),
    ],
)
def test_names_that_several_images_would_have_are_refused(registry: Registry, template: str, distinct: bool) -> None:
    """With seeds 11 and 1 the images 1 and 11 would be 111; with one digit 10 and 11 are 1e+01."""
    jobs = jobs_of(registry, [{"seed": 11}, *[{"seed": 1, "prompt": "A Fox"}] * 11])
    output = OutputSettings(template=template)
    names = [str(name_of(job, output)).lower() for job in jobs]
    if template == "{index}/{seed}":
        assert len(set(names)) == len(names)  # the index is in the folder, so that the names are looked at
        distinct = True
    assert (len(set(names)) == len(names)) == distinct
    if distinct:
        check_distinct_names(jobs, output)
    else:
        with pytest.raises(UsageError, match="would both be"):
            check_distinct_names(jobs, output)


# The journal


def test_a_journal_is_read_from_all_its_parts_whatever_is_broken_in_them(tmp_path: Path) -> None:
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(40)]
    expected = {}
    for number, key in enumerate(keys):
        part = None if number % 4 == 0 else f"shard-{number % 4}-of-3"
        journal = Journal(tmp_path, part)
        data = f"image {number}".encode()
        journal.note(key, None, f"{number}.png", data)
        (tmp_path / f"{number}.png").write_bytes(data)
        expected[key] = f"{number}.png"
    for path in sorted(tmp_path.glob(".sdcli-journal*")):
        with open(path, "ab") as file:
            file.write(b'not json\n[1]\n{"request": 3}\n\xff\xfe\n{"request": "torn')
    (tmp_path / "7.png").write_bytes(b"another image")
    del expected[keys[7]]
    journal = Journal(tmp_path)
    found = {key: journal.finished(key, lambda: None, taken=set()) for key in keys}
    assert {key: path for key, path in found.items() if path is not None} == expected
    assert journal.finished("0" * 64, lambda: None, taken=set()) is None
    assert len(list(tmp_path.glob(".sdcli-journal-*"))) == 3


def test_the_last_run_counts_whichever_part_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("sdcli.generation.journal.time.time", lambda: next(times))
    for seed, part in ((30, "b"), (10, None), (20, "c")):
        journal = Journal(tmp_path, part)
        journal.begin_run("prompts.txt", seed)
        journal.note("00" * 32, None, "a.png", b"")
    assert Journal(tmp_path).base_seed("prompts.txt") == 30
    assert Journal(tmp_path).base_seed("other.txt") is None


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    first, second = "ab" * 8 + "0" * 48, "ab" * 8 + "1" * 48
    for key in (first, second):
        Journal(tmp_path).note(key, None, f"{key}.png", key.encode())
        (tmp_path / f"{key}.png").write_bytes(key.encode())
    journal = Journal(tmp_path)
    assert [journal.finished(key, lambda: None, taken=set()) for key in (first, second)] == [
        f"{first}.png", f"{second}.png",
    ]  # fmt: skip


def test_of_equal_requests_each_keeps_the_image_of_its_own_name(registry: Registry, tmp_path: Path) -> None:
    """Two shards have one each: neither takes that of the other for its own, whichever is there."""
    jobs = jobs_of(registry, [{}, {}, {"seed": 8}])
    output = OutputSettings(outdir=tmp_path, resume=True)
    second = str(name_of(jobs[1], output))
    (tmp_path / second).write_bytes(b"image")
    Journal(tmp_path).add([entry_of(jobs[1].request.key(), None, second, b"image")])
    found = Writer(output, Journal(tmp_path)).finished(jobs)
    assert found == {2: tmp_path / second}
    for index, expected in ((1, set()), (2, {2})):
        writer = Writer(output, Journal(tmp_path), shard=RunShard(index, 2))
        assert writer.finished(jobs, own={index}).keys() & {index} == expected


def test_shards_of_different_plans_are_refused_or_with_resume_warned_about(registry: Registry, tmp_path: Path) -> None:
    jobs = jobs_of(registry, [{"seed": seed} for seed in range(4)])

    def divided(index: int, limits: Limits, *, resume: bool = False) -> tuple[list[tuple[int, ...]], str]:
        shard = RunShard(index, 2)
        journal = Journal(tmp_path, shard.name)
        journal.begin_run("prompts.txt", 0)
        writer = Writer(OutputSettings(outdir=tmp_path, resume=resume), journal, shard=shard)
        batches, note = writer.divided(plan(jobs, limits))
        return [indices(batch) for batch in batches], note

    assert divided(1, Limits(2)) == ([(1, 2)], "")
    assert divided(2, Limits(2)) == ([(3, 4)], "")
    with pytest.raises(UsageError, match="divides other batches"):
        divided(2, Limits(1))
    assert divided(2, Limits(2), resume=True) == ([(3, 4)], "")
    batches, note = divided(1, Limits(1), resume=True)
    assert batches == [(1,), (3,)]
    assert "kind of device" in note
    assert divided(2, Limits(1), resume=True) == ([(2,), (4,)], "")


# Occurrences


def test_occurrences_are_counted_as_a_counter_does() -> None:
    rng, expected, counted = random.Random(1), Counter[str](), Occurrences()
    for _ in range(20_000):
        key = hashlib.sha256(str(rng.randrange(6000)).encode()).hexdigest()
        expected[key] += 1
        assert counted.add(key) == expected[key]
    assert counted.add("0" * 64) == 1
    assert counted.add("0" * 64) == 2


def test_seeds_that_lines_leave_open_do_not_depend_on_what_else_is_in_the_file(registry: Registry) -> None:
    lines = [Line(n, {"prompt": prompt, "model": "tiny"}) for n, prompt in enumerate(["a", "b", "a"])]
    options: dict[str, Any] = {"num_images": 1, "base_seed": 5}
    seeds = [job.request.seed for job in expand(lines, {}, registry, **options) if isinstance(job, ResolvedJob)]
    more = [Line(9, {"prompt": "c", "model": "tiny", "seed": 1}), *lines]
    again = [job.request.seed for job in expand(more, {}, registry, **options) if isinstance(job, ResolvedJob)]
    assert again[1:] == seeds
    assert len(set(seeds)) == 3
