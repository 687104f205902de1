"""The same requests give the same bytes: what same_bytes_cases.py makes is what same_bytes.json holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.cpu import vendor

RECORDED = Path(__file__).with_name("same_bytes.json")


def differences(name: str, before: Any, now: Any) -> list[str]:
    """One line for each exit code, file or digest that is not what was recorded."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [line for one in names for line in differences(f"{name} {one}", before.get(one), now.get(one))]
    return [] if before == now else [f"{name}: {before} was recorded, now it is {now}"]


@pytest.mark.slow
def test_requests_and_trainings_give_the_bytes_that_were_recorded(tmp_path: Path) -> None:
    every = json.loads(RECORDED.read_text())
    if vendor() not in every:
        pytest.skip(f"no bytes are recorded for CPUs of {vendor()}; `python -m tests.same_bytes_cases --write` does")
    command = [sys.executable, "-m", "tests.same_bytes_cases", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    recorded, found = every[vendor()], json.loads(done.stdout)
    assert recorded.keys() == found.keys()
    wrong = [line for name in recorded for line in differences(name, recorded[name], found[name])]
    assert not wrong, "\n".join(wrong)
