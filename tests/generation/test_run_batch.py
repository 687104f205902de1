"""The laws of a batch and of the model cache: cancelling, threads, changed models, memory, and events."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.generation import run_batch as run_batch_module
from sdcli.generation.events import BatchEvent, Cancelled, Failed, Generated, Phase, Progress, Result
from sdcli.generation.model_cache import Lease, ModelCache
from sdcli.generation.observers import HeatmapObserver
from sdcli.generation.plan import Batch
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.run_batch import run_batch
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line
from tests.conftest import REPOSITORY
from tests.service import cache_of, generate_files, results
from tests.tiny import save_tiny_pipeline

SMALL = {"width": 64, "height": 64, "steps": 4, "seed": 7}


def jobs_of(model: Path | str, *prompts: str, **typed: Any) -> list[ResolvedJob]:
    lines = [Line(0, {"prompt": prompt}) for prompt in prompts]
    jobs = expand(lines, {"model": str(model), **SMALL, **typed}, load_registry(), num_images=1, base_seed=5)
    return [job for job in jobs if isinstance(job, ResolvedJob)]


def pixels_of(events: Sequence[BatchEvent]) -> dict[int, Tensor]:
    return {event.job.index: event.pixels for event in events if isinstance(event, Generated)}


def generated(cache: ModelCache, jobs: Sequence[ResolvedJob], **options: Any) -> dict[int, Tensor]:
    with cache.lease(jobs[0]) as lease:
        return pixels_of(list(run_batch(lease, Batch.of(jobs), **options)))


# Cancelling


def test_a_job_cancelled_in_mid_batch_leaves_it_and_the_other_three_keep_their_bytes() -> None:
    cache, jobs = cache_of(), jobs_of("tiny", *"abcd")
    whole = generated(cache, jobs)
    cancelled, events = set(), []
    with cache.lease(jobs[0]) as lease:
        for event in run_batch(lease, Batch.of(jobs), cancelled=lambda job: job.index in cancelled):
            events.append(event)
            if isinstance(event, Progress) and event.index == 1:
                cancelled.add(2)
    left = [event.jobs for event in events if isinstance(event, Progress)]
    assert left == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 3, 4), (1, 3, 4)]
    assert [event.job.index for event in events if isinstance(event, Cancelled)] == [2]
    found = pixels_of(events)
    assert sorted(found) == [1, 3, 4]
    assert all(torch.equal(found[index], whole[index]) for index in found)


def test_a_job_cancelled_while_another_is_decoded_is_not_decoded() -> None:
    cache, jobs = cache_of(), jobs_of("tiny", "a", "b")
    cancelled: set[int] = set()
    events = []
    with cache.lease(jobs[0]) as lease:
        for event in run_batch(lease, Batch.of(jobs), cancelled=lambda job: job.index in cancelled):
            events.append(event)
            cancelled.update({2} if isinstance(event, Generated) else ())
    assert sorted(pixels_of(events)) == [1]
    assert isinstance(events[-1], Cancelled)


def test_a_batch_ends_early_where_all_of_its_jobs_are_cancelled() -> None:
    cache, jobs = cache_of(), jobs_of("tiny", "a", "b", steps=20)
    steps: list[Progress] = []
    events = []
    with cache.lease(jobs[0]) as lease:
        for event in run_batch(lease, Batch.of(jobs), cancelled=lambda _, steps=steps: len(steps) >= 3):
            events.append(event)
            steps += [event] if isinstance(event, Progress) else []
    assert len(steps) == 3
    assert [event.jobs for event in events[-2:]] == [(1,), (2,)]
    assert all(isinstance(event, Cancelled) for event in events[-2:])


# Threads


@pytest.mark.slow
def test_two_threads_with_a_lease_each_generate_the_bytes_they_would_alone(tiny_folder: Path) -> None:
    guided = {"pag_scale": 2.0, "guidance_scale": 4.0, "steps": 6}  # both swap attention processors on a network
    asked = {"tiny": jobs_of("tiny", "a cat", "a dog", **guided), "folder": jobs_of(tiny_folder, "a cat", **guided)}
    options: dict[str, Any] = {"observers": [HeatmapObserver(())]}
    alone = {name: generated(cache_of(), jobs, **options) for name, jobs in asked.items()}
    together: dict[str, dict[int, Tensor]] = {}
    barrier = threading.Barrier(len(asked))

    def work(name: str) -> None:
        cache = cache_of()
        with cache.lease(asked[name][0]) as lease:
            barrier.wait(timeout=120)
            together[name] = pixels_of(list(run_batch(lease, Batch.of(asked[name]), **options)))

    threads = [threading.Thread(target=work, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for name, images in alone.items():
        assert together[name].keys() == images.keys()
        assert all(torch.equal(together[name][index], image) for index, image in images.items())


def test_a_cache_lends_its_networks_to_one_user_at_a_time() -> None:
    cache, jobs = cache_of(), jobs_of("tiny", "a")
    order: list[str] = []

    def second() -> None:
        with cache.lease(jobs[0]):
            order.append("second")

    with cache.lease(jobs[0]):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# What the cache keeps


@pytest.mark.slow
def test_a_model_folder_that_was_trained_on_between_two_jobs_is_loaded_again(tmp_path: Path) -> None:
    folder, cache = save_tiny_pipeline(tmp_path / "model"), cache_of()
    (job,) = jobs_of(folder, "a cat")
    before = generated(cache, [job])[1]
    assert cache.has_models(job)
    assert torch.equal(generated(cache, [job])[1], before)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    trained = {name: tensor * 1.1 for name, tensor in load_file(weights).items()}
    save_file(trained, weights)
    assert not cache.has_models(job)
    after = generated(cache, [job])[1]
    assert not torch.equal(after, before)
    assert torch.equal(after, generated(cache_of(), [job])[1])


@pytest.mark.slow
def test_an_unloaded_cache_loads_again() -> None:
    cache = cache_of()
    (job,) = jobs_of("tiny", "a cat")
    before = generated(cache, [job])[1]
    cache.unload()
    assert not cache.has_models(job)
    assert torch.equal(generated(cache, [job])[1], before)


# Memory


class Encoder:
    """A prompt encoding that keeps nothing."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(at=lambda _: None)

    def shape(self, _: Any) -> tuple[()]:
        return ()


@pytest.mark.slow
def test_ten_thousand_jobs_take_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (template,) = jobs_of("tiny", "a cat", steps=1)
    step = SimpleNamespace(index=0, count=1, latents=torch.zeros(1, 4, 8, 8))
    monkeypatch.setattr(run_batch_module, "sample", lambda *_, **__: iter([step]))
    monkeypatch.setattr(run_batch_module, "decode_with_fallbacks", lambda *_: (torch.zeros(3, 8, 8), ()))
    monkeypatch.setattr(run_batch_module, "check_request", lambda *_: None)
    model = SimpleNamespace(tokenizer=None, spec=template.model)
    pipeline: Any = SimpleNamespace(encode=Encoder(), model=model, space=None)
    lease = Lease(pipeline)

    def run(indices: range) -> Iterator[Generated]:
        for index in indices:
            job = ResolvedJob(index, template.request.model_copy(update={"seed": index}), template.model)
            *_, last = run_batch(lease, Batch.of([job]))
            assert isinstance(last, Generated)
            yield last

    tracemalloc.start()
    held = []
    for indices in (range(500), range(500, 10_000)):
        assert sum(1 for _ in run(indices)) == len(indices)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 64 * 1024


# Events


def test_every_event_names_its_jobs_and_every_job_has_one_result(tmp_path: Path) -> None:
    jobs = [*jobs_of("tiny", *"abc"), *jobs_of("tiny", "d AND e")]
    jobs = [ResolvedJob(index, job.request, job.model) for index, job in enumerate(jobs, start=1)]
    events = generate_files(jobs, tmp_path, run={"batch_size": 2})
    assert {type(event) for event in events} >= {Phase, Progress, Result}
    for event in events:
        assert event.jobs, event
        assert set(event.jobs) <= {1, 2, 3, 4}
    assert sorted(event.jobs for event in results(events)) == [(1,), (2,), (3,), (4,)]
    assert {event.jobs for event in events if isinstance(event, Progress)} == {(1, 2), (3,), (4,)}


def test_the_seconds_of_a_split_batch_are_those_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    sample = run_batch_module.sample

    def timed(pipeline: Any, requests: Any, **options: Any) -> Iterator[Any]:
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        now[0] += 10.0 * len(requests)
        yield from sample(pipeline, requests, **options)

    monkeypatch.setattr(run_batch_module, "sample", timed)
    monkeypatch.setattr(run_batch_module.time, "monotonic", lambda: now[0])
    cache, jobs = cache_of(), jobs_of("tiny", *"abc")
    with cache.lease(jobs[0]) as lease:
        events = list(run_batch(lease, Batch.of(jobs)))
    seconds = {event.job.index: event.seconds for event in events if isinstance(event, Generated)}
    assert seconds == {1: 10.0, 2: 10.0, 3: 10.0}


def test_a_failed_job_is_named_and_its_batch_mates_continue(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    (good,) = jobs_of("tiny", "a")
    request = good.request.model_copy(update={"init_image": {"path": str(broken)}, "strength": 0.5})
    bad = ResolvedJob(2, type(good.request).model_validate(dict(request)), good.model)
    with cache_of().lease(good) as lease:
        events = list(run_batch(lease, Batch.of([good, bad])))
    assert [event.jobs for event in events if isinstance(event, Failed)] == [(2,)]
    assert [event.jobs for event in events if isinstance(event, Generated)] == [(1,)]


@pytest.mark.parametrize("module", ["plan", "events", "settings", "journal", "filenames"])
def test_planning_and_events_import_no_torch(module: str) -> None:
    program = f"import sys, sdcli.generation.{module}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False"
