"""A warm worker for tests: a real process of --keep-warm in a runtime folder of its own, and commands that find it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdcli.server.warm.messages import Wire
from sdcli.server.warm.place import Place
from tests.forked import run_forked

REPOSITORY = Path(__file__).parents[2]
TINY = ["-m", "tiny", "--device", "cpu", "--seed", "3"]
LINE = "generating without the warm worker: "


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """A runtime folder with a short name: that of a socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="sdcli-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Done:
    """What a command did. Seconds, and what the journal says of the run itself, differ from run to run: left out."""

    code: int | None
    out: str
    err: str
    files: dict[str, bytes]


def finished(done: subprocess.CompletedProcess[str], folder: Path) -> Done:
    out = re.sub(r'"seconds": [0-9.]+', '"seconds": 0', done.stdout)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in [name for name in files if name.endswith("journal.jsonl")]:
        files[name] = b"".join(line for line in files[name].splitlines(True) if b"base_seed" not in line)
    return Done(done.returncode, out, done.stderr, files)


def generate(folder: Path, *arguments: str | Path, given: str = "") -> Done:
    """`sdcli generate` in a folder, in a process that is forked with the environment of this one."""
    folder.mkdir(exist_ok=True)
    return finished(run_forked(["generate", *map(str, arguments)], cwd=folder, timeout=240, given=given), folder)


def command(*arguments: str | Path) -> list[str]:
    """`sdcli generate` as a new interpreter."""
    return [sys.executable, "-m", "sdcli", "generate", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


def workers(folder: Path) -> list[int]:
    """The process ids of the workers of --keep-warm that have that runtime folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            if b"sdcli.server.warm.process" in line and str(folder).encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.02)


@contextmanager
def warm_worker(runtime: Path, variables: Mapping[str, str], *, device: str = "cpu") -> Iterator[int]:
    """A worker of --keep-warm; its process id. Killed at the end if it is still there."""
    from sdcli.server.warm.process import start

    before = dict(os.environ)
    os.environ.update(variables)
    try:
        start(Place(device, "auto"), 600)
    finally:
        os.environ.clear()
        os.environ.update(before)
    (pid,) = workers(runtime)
    try:
        yield pid
    finally:
        for one in workers(runtime):
            os.kill(one, signal.SIGKILL)


@contextmanager
def listening(place: Place, serve: Callable[[Wire], None]) -> Iterator[None]:
    """A worker in a thread of this process, which treats every command as `serve` says."""
    lock = place.lock()
    assert lock is not None
    listener = place.listen()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            wire = Wire(connection, trusting=True)
            serve(wire)
            wire.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        os.close(lock)
