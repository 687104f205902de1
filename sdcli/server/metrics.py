"""Figures of the server in the text format of Prometheus, by its own client library."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sdcli.server.jobs import Job

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server; a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.accepted = Counter("sdcli_jobs_accepted", "Jobs that were queued", registry=own)
        self.refused = Counter("sdcli_jobs_refused", "Jobs that were refused because the queue was full", registry=own)
        self.images = Counter("sdcli_images", "Finished images", registry=own)
        self.joined = Counter("sdcli_jobs_joined", "Jobs that were generated in a batch with others", registry=own)
        self.deaths = Counter("sdcli_worker_deaths", "Worker processes that died", registry=own)
        self._failures = Counter("sdcli_images_failed", "Images that failed, by kind", ["kind"], registry=own)
        self._ended = Counter("sdcli_jobs_ended", "Jobs that ended, by their state", ["state"], registry=own)
        self._requests = Counter("sdcli_http_requests", "Answered requests, by status", ["status"], registry=own)
        self._wait = Histogram("sdcli_wait_seconds", "Time in the queue", buckets=SECONDS, registry=own)
        self._run = Histogram("sdcli_run_seconds", "Time with a worker", buckets=SECONDS, registry=own)
        self._waiting = Gauge("sdcli_jobs_waiting", "Jobs in the queue", registry=own)
        self._running = Gauge("sdcli_jobs_running", "Jobs with a worker", registry=own)
        self._ready = Gauge("sdcli_workers_ready", "Worker processes that take jobs", registry=own)
        self._kept = Gauge("sdcli_kept_bytes", "Finished images that can still be fetched, in bytes", registry=own)
        self._memory = Gauge("sdcli_memory_bytes", "Resident memory of a process", ["process"], registry=own)
        self.watch_memory("server", os.getpid)
        self._recent: deque[float] = deque(maxlen=20)

    def watch(
        self,
        *,
        waiting: Callable[[], int],
        running: Callable[[], int],
        ready: Callable[[], int],
        kept: Callable[[], int],
    ) -> None:
        """Where the gauges get their values, each time that somebody asks for them."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
        self._ready.set_function(ready)
        self._kept.set_function(kept)

    def watch_memory(self, name: str, pid: Callable[[], int | None]) -> None:
        """Show the memory of a process under a name; `pid` is None while there is none."""
        self._memory.labels(name).set_function(lambda: _resident(pid()))

    def waited(self, job: Job) -> None:
        self._wait.observe(time.time() - job.created)

    def ran(self, job: Job) -> None:
        self._ended.labels(job.state).inc()
        if job.started is not None and job.ended is not None:
            self._recent.append(job.ended - job.started)
            self._run.observe(self._recent[-1])

    def failed(self, kind: str) -> None:
        self._failures.labels(kind).inc()

    def answered(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def typical_run(self) -> float:
        """How long a job takes, in seconds: the median of the last 20; 5 where none has run yet."""
        return median(self._recent) if self._recent else 5.0

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _resident(pid: int | None) -> float:
    """The resident memory of a process in bytes; 0 where the system does not show it."""
    if pid is None:
        return 0.0
    try:
        with open(f"/proc/{pid}/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0.0
