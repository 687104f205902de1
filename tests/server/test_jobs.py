"""The native API of a running server, as its clients see it."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.in_process import png
from tests.server.running import RunningServer

LONG = {"prompt": "x", "steps": 300, "seed": 3}
"""Takes some seconds, so that there is time to do something meanwhile. For jobs that are cancelled."""
SHORTER = {**LONG, "steps": 100}
"""Takes long enough to be seen at work. For jobs that run to their end."""


def events(server: RunningServer, id: str, *, after: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a job with their numbers, as they come."""
    headers = {} if after is None else {"last-event-id": str(after)}
    with server.http.stream("GET", f"/v1/jobs/{id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(":")
            if name:
                fields[name] = value
            elif fields:
                yield int(fields["id"]), json.loads(fields["data"])
                fields = {}


def wait_for(server: RunningServer, id: str, kind: str) -> dict[str, Any]:
    """The first event of a kind."""
    return next(event for _, event in events(server, id) if event["type"] == kind)


def test_a_job_ends_with_its_images(server: RunningServer) -> None:
    job = server.submit({"prompt": "a fox", "num_images": 2})
    assert job["state"] in ("queued", "running")
    ended = server.finished(job["id"])
    assert (ended["state"], [image["seed"] for image in ended["images"]]) == ("done", [1, 2])
    assert ended["expires"] > time.time()
    for number in range(2):
        answer = server.http.get(ended["images"][number]["url"])
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64)


def test_the_events_tell_the_whole_story_in_order(server: RunningServer) -> None:
    id = server.submit({"prompt": "x", "steps": 30}, previews=0.1, partial_images=2)["id"]
    found = list(events(server, id))
    kinds = list(dict.fromkeys(event["type"] for _, event in found))
    main = ["running", "step", "image", "end"]
    assert [kind for kind in kinds if kind in main] == main
    assert [number for number, _ in found] == sorted({number for number, _ in found})
    steps = [event for _, event in found if event["type"] == "step"]
    assert [step["step"] for step in steps] == sorted(step["step"] for step in steps)
    assert steps[-1]["step"] == steps[-1]["steps"] == 30
    assert all(step["per_second"] > 0 and step["seconds_left"] >= 0 for step in steps)
    assert [step["progress"] for step in steps] == sorted(step["progress"] for step in steps)
    assert steps[0]["seconds_left"] > steps[-1]["seconds_left"]
    assert [event["step"] for _, event in found if event["type"] == "partial"] == [10, 20]
    last = [(number, event) for number, event in events(server, id, after=found[-2][0])]
    assert last == found[-1:], "a client that comes back gets the rest"


@pytest.mark.slow
def test_previews_and_partial_images_can_be_fetched(server: RunningServer) -> None:
    id = server.submit(LONG, previews=0.1, partial_images=1)["id"]
    for path, kind in ((f"/v1/jobs/{id}/preview", "preview"), (f"/v1/jobs/{id}/partials/0", "partial")):
        event = wait_for(server, id, kind)
        for address in (path, event["url"]):
            answer = server.http.get(address)
            assert answer.status_code == 200
            Image.open(io.BytesIO(answer.content)).load()
    server.http.delete(f"/v1/jobs/{id}")
    assert server.finished(id)["state"] == "cancelled"
    assert server.http.get(f"/v1/jobs/{id}/preview").status_code == 404


def test_cancelling_stops_between_steps_and_leaves_other_jobs(server: RunningServer) -> None:
    id = server.submit(LONG)["id"]
    other = server.submit({"prompt": "y"})["id"]
    wait_for(server, id, "step")
    assert server.http.delete(f"/v1/jobs/{id}").status_code == 200
    assert server.finished(id)["state"] == "cancelled"
    assert server.http.delete(f"/v1/jobs/{id}").json()["state"] == "cancelled"
    assert server.finished(other)["state"] == "done"
    assert server.http.delete(f"/v1/jobs/{other}").json()["state"] == "done"


@pytest.mark.slow
def test_one_image_of_a_running_job_can_be_cancelled(server: RunningServer) -> None:
    id = server.submit({**SHORTER, "num_images": 2})["id"]
    wait_for(server, id, "step")
    server.http.delete(f"/v1/jobs/{id}/images/0")
    ended = server.finished(id)
    assert (ended["state"], [image["state"] for image in ended["images"]]) == ("partial", ["cancelled", "done"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_client_that_goes_away_cancels_its_job_only_if_it_asked_for_that(server: RunningServer, tied: bool) -> None:
    id = server.submit(LONG, cancel_on_disconnect=tied)["id"]
    with socket.create_connection(("127.0.0.1", server.port)) as follower:
        follower.sendall(f"GET /v1/jobs/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while b"event: step" not in received:
            received += follower.recv(4096)
    deadline = time.monotonic() + 60
    while tied and server.view(id)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    view = server.view(id)
    assert view["state"] == ("cancelled" if tied else "running")
    if not tied:
        time.sleep(0.3)
        assert server.view(id)["progress"] > view["progress"] or server.view(id)["state"] == "done"
    server.http.delete(f"/v1/jobs/{id}")
    server.finished(id)


def test_a_job_that_takes_too_long_is_ended(server: RunningServer) -> None:
    id = server.submit({**LONG, "num_images": 8}, timeout=0.3)["id"]
    ended = server.finished(id)
    assert ended["state"] == "failed"
    assert {image["kind"] for image in ended["images"]} == {"timeout"}
    assert "longer than 0.3 s" in ended["images"][0]["error"]
    assert server.http.get(f"/v1/jobs/{id}/images/0").status_code == 504


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"prompt": "a fox", "seed": 7, "num_images": 3}, ["a fox", "--seed", "7", "-n", "3"]),
        (
            {"prompt": "a (dog:1.2)", "seed": 1, "scheduler": "euler-a", "steps": 6},
            ["a (dog:1.2)", "--seed", "1", "--scheduler", "euler-a", "--steps", "6"],
        ),
    ],
)
def test_the_files_are_those_of_the_command_line(
    server: RunningServer, sdcli: Any, tmp_path: Path, fields: dict[str, Any], options: list[str]
) -> None:
    """Byte for byte, with their metadata, while other jobs wait and run."""
    others = [server.submit({"prompt": f"other {number}", "seed": number, "num_images": 2}) for number in range(4)]
    id = server.submit(fields)["id"]
    done = sdcli("generate", *options, "-m", "tiny", "--device", "cpu", "--outdir", "out", "-o", "{seed}")
    assert done.returncode == 0, done.stderr
    assert server.finished(id)["state"] == "done"
    for number in range(fields.get("num_images", 1)):
        assert server.image(id, number) == (tmp_path / "out" / f"{fields['seed'] + number}.png").read_bytes()
    assert all(server.finished(other["id"])["state"] == "done" for other in others)


def test_an_uploaded_image_gives_the_pixels_of_the_same_file(server: RunningServer, sdcli: Any, tmp_path: Path) -> None:
    """The record holds the digest of the upload here, and the name of the file there."""
    (tmp_path / "init.png").write_bytes(base64.b64decode(png(64, 64)))
    options = ["x", "-m", "tiny", "--seed", "2", "--init-image", "init.png", "--strength", "0.5", "--device", "cpu"]
    done = sdcli("generate", *options, "-o", "image.png", "--outdir", "out")
    assert done.returncode == 0, done.stderr
    served = server.generate(prompt="x", seed=2, init_image=png(64, 64), strength=0.5)
    written = Image.open(tmp_path / "out" / "image.png")
    assert Image.open(io.BytesIO(served)).tobytes() == written.tobytes()


def test_an_image_from_the_server_is_verified_by_the_command_line(
    server: RunningServer, sdcli: Any, tmp_path: Path
) -> None:
    (tmp_path / "served.png").write_bytes(server.generate(prompt="a fox", seed=11))
    verified = sdcli("generate", "--from", "served.png", "--verify", "--device", "cpu")
    assert verified.returncode == 0, verified.stderr


def test_every_request_has_one_line_in_the_log(server: RunningServer) -> None:
    server.http.get("/v1/jobs/job-of-nobody?secret=1", headers={"x-request-id": "find-me-1"})
    lines = server.logged("find-me-1")
    assert len(lines) == 1
    assert "GET" in lines[0]
    assert "404" in lines[0]
    assert "secret" not in lines[0]
