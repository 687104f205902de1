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


def _run(arguments: list[str], cwd: str, environment: dict[str, str], paths: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate(zip(paths, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = ["sdcli", *arguments]
    from sdcli.cli.app import main

    main()
