"""The engine's decisions, with workers that only write down their orders."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sdcli.generation.plan import Limits
from sdcli.models.registry import load_registry
from sdcli.server import engine as engine_module
from sdcli.server.engine import Engine
from sdcli.server.jobs import Job
from sdcli.server.metrics import Metrics
from sdcli.server.native import resolve_images
from sdcli.server.protocol import (
    Cancel,
    Ended,
    Generate,
    Happened,
    ImageDone,
    ImageFailed,
    Order,
    Ready,
    Unusable,
)
from sdcli.server.settings import ServerSettings

REGISTRY = load_registry()


class ScriptedWorker:
    """A worker process that does nothing; the test reports for it."""

    def __init__(self, number: int, settings: Any, *, on_report: Any, on_death: Any, **_: Any) -> None:
        self.number, self.settings, self.ready, self.pid, self.starts = number, settings, False, None, 0
        self.orders: list[Order] = []
        self._on_report, self._on_death = on_report, on_death

    def start(self) -> None:
        self.starts += 1

    def send(self, order: Order) -> None:
        self.orders.append(order)

    def close(self) -> None: ...

    def report(self, report: Any) -> None:
        self.ready = self.ready or isinstance(report, Ready)
        self._on_report(self, report)

    def die(self) -> None:
        self.ready = False
        self._on_death(self, "killed by SIGKILL")

    @property
    def jobs(self) -> list[list[str]]:
        """The ids of the jobs of each order."""
        return [[part.id for part in order.parts] for order in self.orders if isinstance(order, Generate)]

    def finish(self, *ids: str) -> None:
        """Report that jobs of one image are done."""
        for id in ids:
            self.report(ImageDone(id, 0, b"image", {}, "", 0.1))
            self.report(Ended(id))


def job(id: str, *, client: str = "me", **fields: Any) -> Job:
    request = {"model": "tiny", "prompt": "x", "seed": 1, **fields}
    return Job(id, client, resolve_images([request], REGISTRY, ServerSettings()))


def run(
    test: Callable[[Engine, list[ScriptedWorker]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    workers: int = 1,
    ready: bool = True,
    **settings: Any,
) -> None:
    monkeypatch.setattr(engine_module, "WorkerProcess", ScriptedWorker)
    monkeypatch.setattr(engine_module, "RESTART_AFTER", 0.0)

    async def inside() -> None:
        engine = Engine(ServerSettings(devices=(f"cpu:{workers}",), **settings), Metrics())
        engine.start()
        scripted: list[Any] = [slot.worker for slot in engine._slots]
        for worker in scripted if ready else ():
            worker.report(Ready(Limits(), "cpu"))
        await test(engine, scripted)
        await engine.close()

    asyncio.run(inside())


def test_jobs_wait_until_a_worker_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        engine.submit(job("a"))
        assert not engine.ready
        assert workers[0].jobs == []
        workers[0].report(Ready(Limits(), "cpu"))
        assert engine.ready
        assert workers[0].jobs == [["a"]]

    run(test, monkeypatch, ready=False)


def test_a_job_goes_to_the_worker_that_has_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        for id, model in (("a", "tiny"), ("b", "starter")):
            engine.submit(job(id, model=model))
        workers[0].finish("a")
        workers[1].finish("b")
        for id, model in (("c", "starter"), ("d", "tiny")):
            engine.submit(job(id, model=model))
        assert [worker.jobs for worker in workers] == [[["a"], ["d"]], [["b"], ["c"]]]

    run(test, monkeypatch, workers=2)


def test_a_client_with_another_model_is_served_after_a_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        engine.submit(job("first"))
        engine.submit(job("other", client="you", model="starter"))
        for number in range(20):
            engine.submit(job(f"same-{number}"))
        while ["other"] not in workers[0].jobs:
            workers[0].finish(workers[0].jobs[-1][0])
        assert len(workers[0].jobs) == 6

    run(test, monkeypatch)


def test_images_that_were_cancelled_while_they_waited_are_not_wanted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        engine.submit(job("a"))
        second = job("b", num_images=3)
        engine.submit(second)
        engine.cancel(second, frozenset({1}))
        workers[0].finish("a")
        cancel, order = workers[0].orders[-2:]
        assert cancel == Cancel("b", frozenset({1}))
        assert isinstance(order, Generate)
        assert len(order.parts[0].images) == 3, "so that the others have the bytes that they would have had"
        workers[0].report(ImageFailed("b", 1, "cancelled", "cancelled"))
        for number in (0, 2):
            workers[0].report(ImageDone("b", number, b"image", {}, "", 0.1))
        workers[0].report(Ended("b"))
        assert second.state == "partial"
        assert [event["image"] for event in second.events if event is not None and event["type"] == "failed"] == [1]

    run(test, monkeypatch)


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_jobs_of_one_shape_are_joined_as_far_as_a_batch_has_room(monkeypatch: pytest.MonkeyPatch, wait: float) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        engine.submit(job("busy"))
        await asyncio.sleep(wait * 2)  # the wait of the first one is over
        ids = [f"job-{number}" for number in range(9)]
        for number, id in enumerate(ids):
            engine.submit(job(id, prompt=f"p {number}", seed=number))
        engine.submit(job("wide", width=128))
        workers[0].finish("busy")
        await asyncio.sleep(wait * 2)
        if not wait:
            assert workers[0].jobs == [["busy"], ["job-0"]]
            return
        assert workers[0].jobs == [["busy"], ids[:8]]
        workers[0].finish(*ids[:8])
        workers[0].finish("job-8")
        assert workers[0].jobs == [["busy"], ids[:8], ["job-8"], ["wide"]]
        assert all(engine.store.find(id).state == "done" for id in ids)  # type: ignore[union-attr]

    run(test, monkeypatch, batch_wait=wait)


def test_a_death_fails_the_jobs_of_that_worker_alone_and_it_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        jobs = [job(id) for id in ("a", "b", "c")]
        for one in jobs:
            engine.submit(one)
        workers[0].die()
        assert [one.state for one in jobs] == ["failed", "running", "queued"]
        assert jobs[0].error is not None
        assert jobs[0].error.kind == "worker_died"
        workers[1].finish("b")
        assert jobs[2].state == "running"
        await asyncio.sleep(0.01)
        assert [worker.starts for worker in workers] == [2, 1]

    run(test, monkeypatch, workers=2)


def test_reports_that_come_too_late_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        one = job("a")
        engine.submit(one)
        workers[0].finish("a")
        seen = list(one.events)
        for report in (ImageFailed("a", 0, "error", "no"), Happened("a", {"type": "note"}), Ended("a"), Ended("x")):
            workers[0].report(report)
        assert one.state == "done"
        assert one.events == seen

    run(test, monkeypatch)


def test_progress_and_time_left_are_those_of_the_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        one = job("a", num_images=4)
        engine.submit(one)
        step = {"type": "step", "step": 5, "steps": 10, "fraction": 0.5, "per_second": 5.0, "seconds_left": 1.0}
        workers[0].report(Happened("a", {**step, "images": [0, 1]}))
        assert one.progress == 0.25
        assert one.seconds_left == 3.0  # one second of this batch, two of the next
        for number in (0, 1):
            workers[0].report(ImageDone("a", number, b"image", {}, "", 0.1))
        assert one.progress == 0.5
        workers[0].report(Happened("a", {**step, "images": [2, 3]}))
        assert (one.progress, one.seconds_left) == (0.75, 1.0)

    run(test, monkeypatch)


def test_the_shorter_of_two_limits_of_time_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        one = job("a")
        one.timeout = 1e6
        engine.submit(one)
        await asyncio.sleep(0.1)
        assert workers[0].orders[-1] == Cancel("a", None)
        workers[0].report(ImageFailed("a", 0, "cancelled", "cancelled"))
        workers[0].report(Ended("a"))
        assert one.error is not None
        assert (one.state, one.error.kind) == ("failed", "timeout")

    run(test, monkeypatch, timeout=0.02)


def test_only_a_worker_that_never_started_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        found: list[str] = []
        engine.on_unusable = lambda report: found.append(report.sentence)
        workers[0].report(Unusable("no such device", 2))
        assert found == ["no such device"]
        workers[1].report(Ready(Limits(), "cpu"))
        workers[1].die()
        workers[1].report(Unusable("the file is gone", 3))
        assert found == ["no such device"]

    run(test, monkeypatch, workers=2, ready=False)


def test_draining_waits_for_the_running_job_as_long_as_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        one, other = job("a"), job("b")
        engine.submit(one)
        engine.submit(other)
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        assert other.state == "cancelled"
        assert not drained.done()
        workers[0].finish("a")
        await drained
        assert one.state == "done"
        assert workers[0].jobs == [["a"]]

    run(test, monkeypatch, grace=30.0)


def test_what_runs_longer_than_the_grace_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, workers: list[ScriptedWorker]) -> None:
        one = job("a", num_images=2)
        engine.submit(one)
        workers[0].report(ImageDone("a", 0, b"image", {}, "", 0.1))
        await engine.drain()
        assert one.state == "partial"
        assert one.failed[1].sentence == "the server is stopping"

    run(test, monkeypatch, grace=0.02)
