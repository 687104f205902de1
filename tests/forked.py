"""`sdcli` in a process of its own, forked from one that has imported torch: what takes two seconds happens once.

`run_forked` is subprocess.run of it, `Forked` is subprocess.Popen: a real process to signal and to kill. What such a
process cannot show (imports, the environment at the start, a terminal) is tested with a new interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import IO

REPOSITORY = str(Path(__file__).parent.parent)
PRELOADED = [
    "sdcli.cli.generate",
    "sdcli.generation.service",
    "sdcli.generation.encode_files",
    "sdcli.generation.decode_files",
    "sdcli.training.plot",
    "sdcli.training.unet.session",
    "diffusers.optimization",  # which a training imports, and half of diffusers with it
]

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(PRELOADED)


def run_forked(
    arguments: Sequence[str], *, cwd: Path, timeout: float, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command line with `given` on stdin; like subprocess.run, output captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        paths[0].write_text(given, encoding="utf-8")
        process = _forking.Process(
            target=_run, args=(list(arguments), str(cwd), dict(os.environ), [str(path) for path in paths])
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out, err = (path.read_text(encoding="utf-8") for path in paths[1:])
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


class Forked:
    """A running command line, used like a subprocess.Popen with pipes for stdout and stderr, as text."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, session: bool = False
    ) -> None:
        """`env` is added to the environment; `session`: the process leads a session and a group of its own."""
        environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", **(env or {})}
        streams = [_forking.Pipe(duplex=False) for _ in range(2)]
        ends = [writer for _, writer in streams]
        self._arguments = list(arguments)
        self._process = _forking.Process(target=_serve, args=(self._arguments, str(cwd), environment, ends, session))
        self._process.start()
        for end in ends:
            end.close()
        self.stdout, self.stderr = (_text(reader) for reader, _ in streams)
        self.pid: int = self._process.pid or 0
        Finalize(None, self.kill, exitpriority=10)  # multiprocessing would wait at the end for what a failed test left

    @property
    def returncode(self) -> int | None:
        """As of subprocess: the exit code, or minus the number of the signal that ended the process."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What is left of stdout and stderr, after the end of the process."""
        found = ["", ""]

        def read(place: int, stream: IO[str]) -> None:
            found[place] = stream.read()

        readers = [
            threading.Thread(target=read, args=(place, stream), daemon=True)
            for place, stream in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self._arguments, timeout)
        return found[0], found[1]


def _text(reader: Connection) -> IO[str]:
    descriptor = os.dup(reader.fileno())
    reader.close()
    return os.fdopen(descriptor, encoding="utf-8")


def run_forked_raw(
    arguments: Sequence[str], *, cwd: Path, streams: str, encoding: str = "utf-8"
) -> tuple[int | None, bytes, bytes]:
    """(exit code, stdout, stderr) of the command line with streams as a shell writes them: `<&-`, `>/dev/full`.

    stdin is empty unless it is closed.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        for path in paths:
            path.touch()
        targets = [str(path) for path in paths]
        for stream in streams.split():
            number = 0 if stream.startswith("<") else 2 if stream.startswith("2") else 1
            targets[number] = "" if stream.endswith("&-") else stream.partition(">")[2]
        process = _forking.Process(target=_run, args=(list(arguments), str(cwd), dict(os.environ), targets, encoding))
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, paths[1].read_bytes(), paths[2].read_bytes()


def _serve(arguments: list[str], cwd: str, environment: dict[str, str], ends: list[Connection], session: bool) -> None:
    import torch

    if session:
        os.setsid()
    for number, end in enumerate(ends, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # the environment was read when torch was imported
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    _main(arguments)


def _run(
    arguments: list[str], cwd: str, environment: dict[str, str], paths: list[str], encoding: str = "utf-8"
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate(zip(paths, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        if path:
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        else:
            os.close(number)
    # as Python makes them: None for a closed one
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False) if paths[0] else None  # type: ignore[assignment]
    out = os.fdopen(1, "w", encoding=encoding, closefd=False) if paths[1] else None
    err = os.fdopen(2, "w", encoding=encoding, closefd=False, buffering=1) if paths[2] else None
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    _main(arguments)


def _main(arguments: list[str]) -> None:
    sys.argv = ["sdcli", *arguments]
    from sdcli.cli.app import main

    multiprocessing.set_start_method(None, force=True)  # the default, not that of this process, for its own workers
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does; without torch's, its workers would seem to be killed
