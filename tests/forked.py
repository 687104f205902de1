"""`sdcli` in a process of its own, forked from one that has imported torch: what takes two seconds happens once.

What such a process cannot show (imports, the environment at the start, a terminal) is tested with a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PRELOADED = [
    "sdcli.cli.generate",
    "sdcli.generation.service",
    "sdcli.generation.encode_files",
    "sdcli.generation.decode_files",
    "sdcli.training.plot",
    "sdcli.training.unet.session",
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
    sys.argv = ["sdcli", *arguments]
    from sdcli.cli.app import main

    main()
