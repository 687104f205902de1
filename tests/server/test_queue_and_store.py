"""Jobs that wait, that are cancelled before they run, and that have expired; without worker processes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from sdcli.server.engine import Engine
from sdcli.server.jobs import Job, JobStore
from sdcli.server.protocol import ImageDone
from sdcli.server.run import _listen
from sdcli.server.settings import ServerSettings
from tests.server.in_process import answers, application, job_of, png


def run(test: Callable[[httpx.AsyncClient, Engine], Awaitable[None]], **settings: Any) -> None:
    async def inside() -> None:
        async with application(**settings) as (http, engine):
            await test(http, engine)

    asyncio.run(inside())


async def submitted(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.request(**job_of(**fields))
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    view: dict[str, Any] = answer.json()
    return view


async def events_of(job: Job) -> list[dict[str, Any]]:
    return [event async for _, event in job.follow()]


def test_waiting_jobs_know_their_places() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        ids = [(await submitted(http))["id"] for _ in range(3)]
        places = [(await http.get(f"/v1/jobs/{id}")).json()["place"] for id in ids]
        assert places == [1, 2, 3]
        await http.delete(f"/v1/jobs/{ids[0]}")
        places = [(await http.get(f"/v1/jobs/{id}")).json()["place"] for id in ids]
        assert places == [None, 1, 2]

    run(test)


def test_a_full_queue_answers_429_and_when_to_come_back() -> None:
    *accepted, refused = answers(*[job_of()] * 4, max_queue=3)
    assert [answer.status_code for answer in accepted] == [202] * 3
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


def test_a_waiting_job_can_be_cancelled_again_and_again() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        id = (await submitted(http, num_images=2))["id"]
        for _ in range(3):
            view = (await http.delete(f"/v1/jobs/{id}")).json()
            assert view["state"] == "cancelled"
            assert [image["state"] for image in view["images"]] == ["cancelled"] * 2
        job = engine.store.find(id)
        assert job is not None
        assert [event["type"] for event in await events_of(job)] == ["queued", "failed", "failed", "end"]
        assert (await http.get(f"/v1/jobs/{id}/images/0")).status_code == 409
        assert engine.waiting == 0

    run(test)


def test_single_images_of_a_waiting_job_can_be_cancelled() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        id = (await submitted(http, num_images=3))["id"]
        view = (await http.delete(f"/v1/jobs/{id}/images/1")).json()
        assert view["state"] == "queued"
        assert [(image["seed"] - view["images"][0]["seed"], image["state"]) for image in view["images"]] == [
            (0, "waiting"),
            (1, "cancelled"),
            (2, "waiting"),
        ]
        assert (await http.delete(f"/v1/jobs/{id}/images/3")).status_code == 404
        for number in (0, 2):
            view = (await http.delete(f"/v1/jobs/{id}/images/{number}")).json()
        assert view["state"] == "cancelled"
        assert engine.waiting == 0

    run(test)


def test_ids_that_never_were_are_404_and_those_that_expired_410() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        assert (await http.get("/v1/jobs/job-x")).status_code == 404
        id = (await submitted(http))["id"]
        view = (await http.delete(f"/v1/jobs/{id}")).json()
        engine.store.expire(view["expires"] - 0.1)
        assert (await http.get(f"/v1/jobs/{id}")).status_code == 200
        engine.store.expire(view["expires"])
        for path in ("", "/images/0", "/events", "/preview"):
            assert (await http.get(f"/v1/jobs/{id}{path}")).status_code == 410

    run(test, keep=10)


def finished(id: str, size: int) -> Job:
    job = Job(id, "client", ())
    job.done[0] = ImageDone(id, 0, b"x" * size, {}, "", 0.0)
    job.finish()
    return job


def test_finished_images_take_a_bounded_part_of_memory() -> None:
    store = JobStore(keep=1e9, max_bytes=1000)
    for number in range(100):
        job = finished(f"job-{number}", 300)
        store.add(job)
        store.finished(job)
        assert store.kept_bytes <= 1000
    assert [job.id for job in store] == ["job-97", "job-98", "job-99"]
    assert store.was_there("job-0")
    large = finished("large", 5000)
    store.add(large)
    store.finished(large)
    assert [job.id for job in store] == ["large"], "the newest one can be fetched however large it is"


def test_an_upload_is_not_kept_when_its_job_is_over() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        id = (await submitted(http, init_image=png(64, 64), mask=png(64, 64)))["id"]
        job = engine.store.find(id)
        assert job is not None
        before = job.images[0].request
        assert before.init_image.data  # type: ignore[union-attr]
        await http.delete(f"/v1/jobs/{id}")
        after = job.images[0].request
        assert (after.init_image.data, after.mask.data) == (None, None)  # type: ignore[union-attr]
        assert after.key() == before.key()

    run(test)


def test_answers_do_not_wait_for_the_acknowledgement_of_their_beginning() -> None:
    with _listen(ServerSettings(port=0)) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "accepted connections inherit it"


def test_a_request_id_is_taken_over_or_made() -> None:
    own, made, bad = answers(
        {"url": "/healthz", "headers": {"x-request-id": "abc-1.2"}},
        {"url": "/healthz"},
        {"url": "/healthz", "headers": {"x-request-id": "a b\x01" + "c" * 300}},
    )
    assert own.headers["x-request-id"] == "abc-1.2"
    assert made.headers["x-request-id"].startswith("req-")
    assert bad.headers["x-request-id"].startswith("req-")


def test_a_draining_server_refuses_with_retry_after() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        id = (await submitted(http))["id"]
        await engine.drain()
        assert (await http.get(f"/v1/jobs/{id}")).json()["state"] == "cancelled"
        refused = await http.request(**job_of())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200

    run(test)


def test_metrics_are_those_of_prometheus() -> None:
    async def test(http: httpx.AsyncClient, engine: Engine) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        await submitted(http)
        answer = await http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        assert samples["sdcli_jobs_accepted_total"] == 1
        assert samples["sdcli_jobs_waiting"] == 1
        assert samples["sdcli_memory_bytes"] > 1e6

    run(test)


def test_requests_of_several_lines_are_one_job_whose_seeds_repeat() -> None:
    lines = [{"model": "tiny", "prompt": "a", "seed": 5, "num_images": 2}, {"model": "tiny", "prompt": "b", "seed": 9}]
    (answer,) = answers({"method": "POST", "url": "/v1/jobs", "json": {"requests": lines}})
    assert [image["seed"] for image in answer.json()["images"]] == [5, 6, 9]
