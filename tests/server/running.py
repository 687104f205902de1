"""A real `sdcli serve` in a process of its own, for tests: started on a free port, spoken to by HTTP, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds that a step may take on a machine that is busy with other things."""


class RunningServer:
    """A server that takes jobs. `log` is its stderr so far."""

    def __init__(self, process: subprocess.Popen[str], url: str, stderr: Path) -> None:
        self.process, self.url, self._stderr = process, url, stderr
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)

    @property
    def log(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    def logged(self, text: str) -> list[str]:
        """The lines of the log with this text; the one of a request comes a moment after its answer."""
        deadline = time.monotonic() + PATIENCE
        while True:
            lines = [line for line in self.log.splitlines() if text in line]
            if lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.01)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers: the children that have imported torch or will."""
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    def submit(self, *requests: Mapping[str, Any], **body: Any) -> dict[str, Any]:
        """Queue a job; `tiny` with a fixed seed unless a request says otherwise. Its view."""
        lines = [{"model": "tiny", "seed": 1, **request} for request in requests]
        answer = self.http.post("/v1/jobs", json={"requests": lines, **body})
        assert answer.status_code == 202, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def view(self, id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{id}")
        assert answer.status_code == 200, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def finished(self, id: str) -> dict[str, Any]:
        """The view of a job when it is over; its event stream ends then."""
        with self.http.stream("GET", f"/v1/jobs/{id}/events") as stream:
            for _ in stream.iter_raw():
                pass
        return self.view(id)

    def image(self, id: str, number: int = 0) -> bytes:
        answer = self.http.get(f"/v1/jobs/{id}/images/{number}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def generate(self, **fields: Any) -> bytes:
        """The file of one image."""
        id = self.submit(fields)["id"]
        assert self.finished(id)["state"] == "done", self.view(id)
        return self.image(id)

    def generate_all(self, **fields: Any) -> list[bytes]:
        """The files of several images of one job."""
        id = self.submit(fields)["id"]
        view = self.finished(id)
        assert view["state"] == "done", view
        return [self.image(id, number) for number in range(len(view["images"]))]

    def metric(self, name: str) -> float:
        """A figure of /metrics, under its name with labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def wait_until_ready(self) -> None:
        ends = time.monotonic() + PATIENCE
        while self.http.get("/readyz").status_code != 200:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < ends, self.log
            time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def running_server(
    folder: Path, *options: str | Path, env: Mapping[str, str] | None = None, wait: bool = True
) -> Iterator[RunningServer]:
    """A server with the model `tiny` on the CPU, or as `options` say, whose HOME is `folder`; ended at the end."""
    device = () if "--device" in options else ("--device", "cpu")
    command = [sys.executable, "-m", "sdcli", "serve", "--port", "0", *device, *map(str, options)]
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
    home = {name: str(folder / name.lower()) for name in names} | {"HOME": str(folder)}
    (folder / "xdg_runtime_dir").mkdir(mode=0o700, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), (env or {}).get("PYTHONPATH")]))
    environment = {**os.environ, **home, "OMP_NUM_THREADS": "1", **(env or {}), "PYTHONPATH": path}
    stderr = folder / "serve.log"
    with stderr.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), stderr.read_text()
        server = RunningServer(process, url, stderr)
        with server.http:
            if wait:
                server.wait_until_ready()
            yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()
