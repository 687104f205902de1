"""The native API of a running server, as its clients see it."""

from __future__ import annotations

import io

from PIL import Image

from tests.server.running import RunningServer


def test_a_job_ends_with_its_images(server: RunningServer) -> None:
    job = server.submit({"prompt": "a fox", "num_images": 2})
    assert job["state"] == "queued"
    ended = server.finished(job["id"])
    assert (ended["state"], [image["seed"] for image in ended["images"]]) == ("done", [1, 2])
    for number in range(2):
        assert Image.open(io.BytesIO(server.image(job["id"], number))).size == (64, 64)
