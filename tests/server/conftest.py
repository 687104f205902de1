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


TOKEN = "a-secret-of-the-tests"


@pytest.fixture(scope="session")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a token, one place in its queue, small bodies, and little time for each job."""
    folder = tmp_path_factory.mktemp("strict")
    file = folder / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    limits = ("--max-queue", "1", "--max-body", "20000", "--timeout", "1.5")
    with running_server(folder, "--token-file", file, "--model", "tiny", *limits) as running:
        running.http.headers["authorization"] = f"Bearer {TOKEN}"
        yield running
