"""How the threads of torch wait: what is set before torch is imported, and who may set something else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdcli.io.threads import wait_without_spinning
from tests.conftest import REPOSITORY

PROGRAM = """
import os, sys
from sdcli.cli.app import app
try:
    app([{command!r}, "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.parametrize("command", ["generate", "encode", "decode", "train-unet"])
def test_threads_wait_without_spinning_before_torch_is_imported(command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    line = [sys.executable, "-c", PROGRAM.format(command=command)]
    done = subprocess.run(line, env={**environment, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["passive", "None"], done.stderr


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_environment_says_about_waiting_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "7")
    before = dict(os.environ)
    wait_without_spinning()
    assert dict(os.environ) == before
