"""One server for the tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import RunningServer, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the model `tiny` on the CPU, for all tests; those that change its state start one of their own."""
    with running_server(tmp_path_factory.mktemp("server"), "--model", "tiny") as running:
        yield running
