"""Memory that torch frees: kept for the next step, and returned when a model is unloaded."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import resource
from pathlib import Path
import torch
from sdcli.io.devices import keep_freed_memory
from sdcli.io.out_of_memory import free_caches

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(64 * 2**18) for _ in range(3)]  # 64 MiB each
    buffers.append(torch.ones(16 * 2**18))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory(large=True)
start = resident()
faults = [faults_of_a_step() for _ in range(8)]
kept = resident()
free_caches()
print(*faults, kept - start, resident() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_step_takes_the_memory_of_the_step_before_and_unloading_returns_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    *faults, kept, left = map(int, done.stdout.split())
    assert faults[0] > 40_000, "the first step touches 208 MiB of new pages"
    assert faults[-3:] == [0, 0, 0]
    assert kept > 190 * 2**20
    assert left < 20 * 2**20
