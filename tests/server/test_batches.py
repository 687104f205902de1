"""Jobs of one shape that are generated in one batch, where `--batch-wait` allows it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.metadata.read import read_image
from tests.server.running import RunningServer, running_server
from tests.server.test_jobs import events, wait_for


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("joining"), "--model", "tiny", "--batch-wait", "2000") as server:
        yield server


def batch_of(data: bytes, folder: Path) -> dict[str, Any]:
    (folder / "image.png").write_bytes(data)
    record = read_image(folder / "image.png").record
    assert record is not None
    batch: dict[str, Any] = record.provenance["batch"]
    return batch


def test_jobs_of_one_shape_become_one_batch_and_the_metadata_says_so(
    joining: RunningServer, server: RunningServer, tmp_path: Path
) -> None:
    requests = [{"prompt": f"animal {number}", "seed": number} for number in range(3)]
    ids = [joining.submit(fields, previews=0.1)["id"] for fields in requests]
    other = joining.submit({"prompt": "x", "width": 128})["id"]
    assert [joining.finished(id)["state"] for id in (*ids, other)] == ["done"] * 4
    for number, (id, fields) in enumerate(zip(ids, requests, strict=True)):
        assert batch_of(joining.image(id), tmp_path) == {"size": 3, "index": number}
        running = next(event for _, event in events(joining, id) if event["type"] == "running")
        assert running["together"] == 3
        alone = np.asarray(Image.open(io.BytesIO(server.generate(**fields))), dtype=int)
        together = np.asarray(Image.open(io.BytesIO(joining.image(id))), dtype=int)
        assert np.abs(alone - together).max() <= 2
    assert batch_of(joining.image(other), tmp_path)["size"] == 1
    assert joining.metric("sdcli_jobs_joined_total") == 3


@pytest.mark.slow
def test_a_job_that_is_cancelled_leaves_the_batch_and_the_others_go_on(joining: RunningServer) -> None:
    ids = [joining.submit({"prompt": "x", "seed": seed, "steps": 60}, previews=0.1)["id"] for seed in range(3)]
    wait_for(joining, ids[1], "step")
    joining.http.delete(f"/v1/jobs/{ids[1]}")
    assert [joining.finished(id)["state"] for id in ids] == ["done", "cancelled", "done"]


def test_a_batch_that_is_full_does_not_wait(joining: RunningServer) -> None:
    """Eight images of 64x64 are one batch on a CPU."""
    id = joining.submit({"prompt": "x", "num_images": 8})["id"]
    ended = joining.finished(id)
    assert ended["state"] == "done"
    running, image = (next(e for _, e in events(joining, id) if e["type"] == kind) for kind in ("running", "image"))
    assert "together" not in running
    assert image["image"] == 0
