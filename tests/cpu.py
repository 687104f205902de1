"""Which CPU the tests run on: sums of floating-point numbers differ from one vendor's to another's."""

from __future__ import annotations

import platform
from pathlib import Path


def vendor() -> str:
    """The vendor of the CPU as Linux names it, such as AuthenticAMD; elsewhere the machine's architecture."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("vendor_id")), platform.machine())
