"""Figures of the server in the text format of Prometheus, by its own client library."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sdcli.server.jobs import Job

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)


class Metrics:
    """The counters of one server; a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.accepted = Counter("sdcli_jobs_accepted", "Jobs that were queued", **own)
        self.refused = Counter("sdcli_jobs_refused", "Jobs that were refused because the queue was full", **own)
        self.images = Counter("sdcli_images", "Finished images", **own)
        self.deaths = Counter("sdcli_worker_deaths", "Worker processes that died", **own)
        self._failures = Counter("sdcli_images_failed", "Images that failed, by kind", ["kind"], **own)
        self._ended = Counter("sdcli_jobs_ended", "Jobs that ended, by their state", ["state"], **own)
        self._wait = Histogram("sdcli_wait_seconds", "Time in the queue", buckets=SECONDS, **own)
        self._run = Histogram("sdcli_run_seconds", "Time with a worker", buckets=SECONDS, **own)
        self._waiting = Gauge("sdcli_jobs_waiting", "Jobs in the queue", **own)
        self._running = Gauge("sdcli_jobs_running", "Jobs with a worker", **own)
        self._memory = Gauge("sdcli_memory_bytes", "Resident memory of the server process", **own)
        self._memory.set_function(_resident)
        self._last = 5.0

    def watch(self, *, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def waited(self, job: Job) -> None:
        self._wait.observe(time.time() - job.created)

    def ran(self, job: Job) -> None:
        self._ended.labels(job.state).inc()
        if job.started is not None and job.ended is not None:
            self._last = job.ended - job.started
            self._run.observe(self._last)

    def failed(self, kind: str) -> None:
        self._failures.labels(kind).inc()

    def typical_run(self) -> float:
        """How long a job takes, in seconds: the last one's time."""
        return self._last

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _resident() -> float:
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * 4096
    except OSError:
        return 0.0
