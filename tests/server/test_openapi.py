"""Requests made from the OpenAPI description, valid and not: no answer is an unexpected error of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.running import RunningServer, running_server

PATIENCE = 2.0
"""Seconds for an answer; a client that waits no longer cancels its job, which is the test of that."""
LONG = ("/v1/jobs/{id}/events",)
"""Routes that answer for as long as a job runs."""


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server on which no request takes long."""
    folder: Path = tmp_path_factory.mktemp("small")
    with running_server(folder, "--model", "tiny", "--max-pixels", "4096", "--max-images", "2") as running:
        yield running


def fuzz(server: RunningServer, *, examples: int) -> dict[str, int]:
    """Send requests to each operation; how many of them were answered."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    return {one.label: len(sent(one, examples=examples)) for one in operations if one.path not in LONG}


def sent(operation: Any, *, examples: int) -> list[int]:
    """The statuses of the answers to requests to an operation; none is that of an unexpected error."""
    statuses: list[int] = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        try:
            answer = case.call(timeout=PATIENCE)
        except requests.Timeout:
            return
        statuses.append(answer.status_code)
        assert answer.status_code != 500, (case.as_curl_command(), answer.text)

    send()
    return statuses


@pytest.mark.slow
def test_no_request_is_an_unexpected_error(small_server: RunningServer) -> None:
    seen = fuzz(small_server, examples=30)
    assert {"POST /v1/images/generations", "POST /v1/images/edits", "POST /sdapi/v1/txt2img"} <= seen.keys()
    assert "Traceback" not in small_server.log
