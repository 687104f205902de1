"""What goes wrong in a worker process costs the job that it happened to, and nobody else."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli.metadata.read import read_image
from tests.server.running import PATIENCE, RunningServer, running_server
from tests.server.test_jobs import LONG, SHORTER, wait_for

INJECTED = Path(__file__).parent / "injected"


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with two workers, in which prompts with certain words fail."""
    options = ("--device", "cpu:2", "--log", "json", "--idle-unload", "0.2")
    with running_server(tmp_path_factory.mktemp("fragile"), *options, env={"PYTHONPATH": str(INJECTED)}) as server:
        yield server


def until(condition: object) -> None:
    """Wait until a function returns something true."""
    ends = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.slow
def test_out_of_memory_with_several_images_goes_on_with_fewer(fragile: RunningServer, tmp_path: Path) -> None:
    id = fragile.submit({"prompt": "CROWDED", "num_images": 4})["id"]
    assert fragile.finished(id)["state"] == "done"
    (tmp_path / "image.png").write_bytes(fragile.image(id, 3))
    record = read_image(tmp_path / "image.png").record
    assert record is not None
    assert record.provenance["batch"]["size"] == 1
    assert "halved" in record.provenance["fallbacks"][0]


def test_out_of_memory_with_one_image_fails_this_job_and_the_server_lives(fragile: RunningServer) -> None:
    workers = fragile.workers
    id = fragile.submit({"prompt": "OOM"})["id"]
    ended = fragile.finished(id)
    assert (ended["state"], ended["images"][0]["kind"]) == ("failed", "out_of_memory")
    answer = fragile.http.get(f"/v1/jobs/{id}/images/0")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "out_of_memory"
    assert fragile.generate(prompt="afterwards")
    assert fragile.workers == workers
    assert fragile.metric('sdcli_images_failed_total{kind="out_of_memory"}') >= 1


def test_a_bug_in_a_worker_is_in_the_log_and_not_in_the_answer(fragile: RunningServer) -> None:
    ended = fragile.finished(fragile.submit({"prompt": "BUG"})["id"])
    assert ended["images"][0]["kind"] == "error"
    assert "secret detail" not in json.dumps(ended)
    assert "secret detail" in fragile.log
    assert fragile.generate(prompt="afterwards")


@pytest.mark.slow
def test_a_crash_fails_its_job_with_a_sentence_and_the_worker_starts_again(fragile: RunningServer) -> None:
    ended = fragile.finished(fragile.submit({"prompt": "CRASH"})["id"])
    assert ended["images"][0]["kind"] == "worker_died"
    assert "SIGSEGV" in ended["images"][0]["error"]
    assert fragile.generate(prompt="meanwhile"), "by the other worker"
    until(lambda: fragile.metric("sdcli_workers_ready") == 2)


def test_kill_9_of_a_worker_fails_its_job_and_no_other(fragile: RunningServer) -> None:
    first, second = (fragile.submit({**SHORTER, "seed": seed})["id"] for seed in (1, 2))
    waiting = fragile.submit({"prompt": "waits", "seed": 5})["id"]
    for id in (first, second):
        wait_for(fragile, id, "step")
    before = fragile.workers
    os.kill(before[0], signal.SIGKILL)
    ended = [fragile.finished(id) for id in (first, second)]
    assert sorted(job["state"] for job in ended) == ["done", "failed"]
    dead = next(job for job in ended if job["state"] == "failed")
    assert "SIGKILL" in dead["images"][0]["error"]
    assert fragile.finished(waiting)["state"] == "done"
    until(lambda: fragile.metric("sdcli_workers_ready") == 2)
    after = fragile.workers
    assert before[0] not in after
    assert before[1] in after
    assert "worker 1 died: killed by SIGKILL" in fragile.log or "worker 2 died: killed by SIGKILL" in fragile.log


def test_two_workers_run_two_jobs_at_once(fragile: RunningServer) -> None:
    ids = [fragile.submit({**LONG, "seed": seed})["id"] for seed in (1, 2)]
    for id in ids:
        wait_for(fragile, id, "step")
    assert [fragile.view(id)["state"] for id in ids] == ["running", "running"]
    for id in ids:
        fragile.http.delete(f"/v1/jobs/{id}")
        fragile.finished(id)


@pytest.mark.slow
def test_idle_models_are_unloaded_and_loaded_again(fragile: RunningServer) -> None:
    lines = [f"worker {number} unloads its models" for number in (1, 2)]
    before = [fragile.log.count(line) for line in lines]
    ids = [fragile.submit({**SHORTER, "seed": seed})["id"] for seed in (1, 2)]
    assert [fragile.finished(id)["state"] for id in ids] == ["done", "done"], "one by each worker"
    until(lambda: all(fragile.log.count(line) > count for line, count in zip(lines, before, strict=True)))
    id = fragile.submit({"prompt": "x"})["id"]
    assert wait_for(fragile, id, "phase")["phase"] == "load"
    assert fragile.finished(id)["state"] == "done"


def test_the_log_is_json_where_that_was_asked_for(fragile: RunningServer) -> None:
    fragile.http.get("/healthz", headers={"x-request-id": "json-1"})
    (line,) = fragile.logged("json-1")
    facts = json.loads(line)
    assert (facts["status"], facts["path"], facts["level"]) == (200, "/healthz", "info")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningServer]:
    """A server of one test, to be stopped."""
    with running_server(tmp_path, "--model", "tiny", "--grace", "600") as server:
        yield server


def test_sigterm_finishes_the_running_job_and_refuses_others(own: RunningServer) -> None:
    running = own.submit(SHORTER)["id"]
    waiting = own.submit({"prompt": "never"})["id"]
    wait_for(own, running, "step")
    ended: list[str] = []

    def follow() -> None:
        with own.http.stream("GET", f"/v1/jobs/{running}/events") as stream:
            ended.extend(stream.iter_lines())

    follower = threading.Thread(target=follow)
    follower.start()
    own.process.send_signal(signal.SIGTERM)
    until(lambda: own.http.get("/readyz").status_code == 503)
    refused = own.http.post("/v1/jobs", json={"requests": {"prompt": "late", "model": "tiny"}})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert own.view(waiting)["state"] == "cancelled"
    assert own.process.wait(PATIENCE) == 0
    follower.join(PATIENCE)
    assert any('"done"' in line for line in ended), "the running job was finished, and its followers heard of it"


@pytest.mark.slow
def test_what_is_not_finished_within_the_grace_is_cancelled(tmp_path: Path) -> None:
    with running_server(tmp_path, "--model", "tiny", "--grace", "0.2") as server:
        id = server.submit({**LONG, "num_images": 8})["id"]
        wait_for(server, id, "step")
        workers = server.workers
        assert server.stop() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(own: RunningServer) -> None:
    wait_for(own, own.submit({**LONG, "num_images": 8})["id"], "step")
    workers = own.workers
    own.process.send_signal(signal.SIGINT)
    until(lambda: own.http.get("/readyz").status_code == 503)
    assert own.stop(signal.SIGINT) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_workers_do_not_outlive_a_server_that_is_killed(own: RunningServer) -> None:
    workers = own.workers
    own.stop(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        pytest.param(("--device", "mps"), 2, "no mps device", marks=pytest.mark.slow),  # which only a worker finds out
        (("--model", "no-such-model"), 3, "no model"),
        (("--device", "cpu:0"), 2, "from 1 to 64"),
        (("--allow-origin", "example.org"), 2, "https://example.org"),
    ],
)
def test_a_server_that_cannot_work_ends_with_a_sentence(
    sdcli: object, tmp_path: Path, options: tuple[str, ...], code: int, sentence: str
) -> None:
    new = {"env": {}} if "mps" in options else {}  # a forked process cannot spawn a worker
    ended = sdcli("serve", "--port", "0", *options, **new)  # type: ignore[operator]
    assert ended.returncode == code
    assert sentence in ended.stderr
