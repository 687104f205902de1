"""A running sdcli command with --cluster for tests, and the worker processes that belong to it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster.processes import command_of, descendants, gone
from tests.conftest import REPOSITORY

LOCAL = ("--cluster", "local", "--workers", "2")
WORKER = "ray::ClusterWorker"


class Driver:
    """A running command in a session of its own, as in a terminal.

    `roots` are processes below which its workers are found: its own one or, where the cluster was there before, those
    of the nodes.
    """

    def __init__(self, folder: Path, arguments: Sequence[str | Path], *, roots: Sequence[int] = ()) -> None:
        command = [sys.executable, "-m", "sdcli", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
        )
        self._roots = tuple(roots) or (self.process.pid,)
        self.seen: set[int] = set()

    def look(self) -> set[int]:
        """The processes of the cluster, now; `seen` are all so far."""
        now = {pid for root in self._roots for pid in descendants(root) if "ray" in command_of(pid)}
        self.seen |= now
        return now

    def workers(self) -> list[int]:
        return sorted(pid for pid in self.look() if command_of(pid).startswith(WORKER))

    def worker_below(self, root: int) -> int:
        """A worker below a process, such as that of a node."""
        while not (found := descendants(root) & set(self.workers())):
            self.check()
        return found.pop()

    def some_workers(self, count: int) -> list[int]:
        """So many workers, which may still be starting."""
        while len(found := self.workers()) < count:
            self.check()
        return found

    def busy_worker(self, *, not_one_of: Sequence[int] = ()) -> int:
        """A worker that runs a unit."""
        while True:
            found = [pid for pid in self.workers() if ".run" in command_of(pid) and pid not in not_one_of]
            if found:
                return found[0]
            self.check()

    def wait_for_image(self, folder: Path, count: int = 1) -> None:
        while len(list(folder.glob("*.png"))) < count:
            self.look()
            self.check()

    def check(self) -> None:
        """Wait a moment; the command is to run still."""
        assert self.process.poll() is None, self.process.communicate()
        time.sleep(0.005)

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; nothing of the cluster is left, but for the nodes that were there before."""
        out, err = self.process.communicate(timeout=timeout)
        own = self._roots == (self.process.pid,)
        left = self.seen if own else {pid for pid in self.seen if command_of(pid).startswith(WORKER)}
        assert not gone(left), [command_of(pid) for pid in left]
        return self.process.returncode, out, err


@contextlib.contextmanager
def driver(folder: Path, *arguments: str | Path, roots: Sequence[int] = ()) -> Iterator[Driver]:
    running = Driver(folder, arguments, roots=roots)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        if not roots:
            gone(running.seen)


def limit(pid: int, kind: int, size: int) -> None:
    """Lower a limit of a process, as `ulimit` would have before it began."""
    resource.prlimit(pid, kind, (size, size))


def address_space(pid: int) -> int:
    """The size of a process's memory as RLIMIT_AS counts it, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
