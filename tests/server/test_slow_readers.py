"""Clients that read slowly, or not at all, with sockets that are really full."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from sdcli.server import http_connection
from sdcli.server.jobs import Job
from tests.server.idle import IdleServer, idle_server

EVENTS, TEXT = 3000, "x" * 4000
"""12 MB, several times what a socket's buffers hold."""
IN_PROCESS = 256 * 1024
"""More than one connection may hold in this process: what asyncio and h11 buffer, and the event that is being sent."""


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[IdleServer]:
    monkeypatch.setattr(http_connection, "UNREAD", 1.0)
    with idle_server() as running:
        yield running


def running_job(idle: IdleServer, *, tied: bool = False) -> Job:
    body = {"requests": {"model": "tiny", "prompt": "x"}, "cancel_on_disconnect": tied}
    httpx.post(f"{idle.url}/v1/jobs", json=body).raise_for_status()
    job = idle.jobs[-1]
    idle.begin(job)
    return job


@contextmanager
def follower(idle: IdleServer, job: Job, *, buffer: int) -> Iterator[socket.socket]:
    """A client that follows the events of a job, and has read the first of them."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", idle.port))
        connection.sendall(f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        read = b""
        while b"event: running" not in read:
            piece = connection.recv(256)
            assert piece, read
            read += piece
        yield connection


def add_events(idle: IdleServer, job: Job) -> None:
    for _ in range(EVENTS // 100):
        idle.in_loop(lambda: [job.add({"type": "note", "text": TEXT, "images": [0]}) for _ in range(100)])


def until(true: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.02)


def test_a_client_that_stops_reading_holds_little_stops_nobody_and_is_dropped(idle: IdleServer) -> None:
    job = running_job(idle)
    with follower(idle, job, buffer=4096):
        add_events(idle, job)
        until(lambda: max(idle.unread, default=0) > 2 * len(TEXT))  # its socket is full, and the server waits
        read = 0
        with httpx.stream("GET", f"{idle.url}/v1/jobs/{job.id}/events", timeout=60) as other:
            for line in other.iter_lines():
                assert max(idle.unread, default=0) < IN_PROCESS
                read += line == "event: note"
                if read == EVENTS and not job.over:
                    idle.finish(job)
        assert read == EVENTS, "everything comes to those who read"
        until(lambda: job.followers == 0)
        until(lambda: not idle.unread)


def test_a_job_that_is_tied_to_a_client_ends_with_its_reading(idle: IdleServer) -> None:
    job = running_job(idle, tied=True)
    cancelled: list[Job] = []
    idle.engine.cancel = lambda one, *_, **__: cancelled.append(one)  # type: ignore[method-assign]
    with follower(idle, job, buffer=4096):
        add_events(idle, job)
        until(lambda: cancelled == [job])


@pytest.mark.slow
def test_a_client_that_reads_slowly_is_not_dropped(idle: IdleServer) -> None:
    job = running_job(idle)
    with follower(idle, job, buffer=2**16) as slow:
        add_events(idle, job)
        until(lambda: max(idle.unread, default=0) > 2 * len(TEXT))
        for _ in range(60):
            time.sleep(0.05)
            slow.recv(2**15)
        assert job.followers == 1
        assert max(idle.unread, default=0) > 0
