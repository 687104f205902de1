"""Devices and number formats of this machine, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from sdcli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("no", "bf16", "fp16")
"""Number formats of training's forward and backward passes; with no, float32."""
LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"
"""The environment variable in which `accelerate launch` passes its --mixed_precision on."""


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises UsageError for a device that does not exist."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in available.items() if here)
    kind = name.partition(":")[0]
    if not available.get(kind, False):
        present = ", ".join(kind for kind, here in available.items() if here)
        raise UsageError(f"this machine has no {name} device (it has {present})")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA, bfloat16 on CPUs with instructions for it, float32 elsewhere."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise UsageError("float16 does not work on the CPU; use bfloat16 or float32")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32


def pick_precision(device: torch.device) -> str:
    """What `--mixed-precision auto` is: bf16 on CPUs that multiply bfloat16 natively, else no.

    Under `accelerate launch` it is what that was told (`--mixed_precision`, by default no): no, bf16 or fp16.
    """
    launched = os.environ.get(LAUNCHED_PRECISION, "").lower()
    if launched in PRECISIONS:
        return launched
    half = device.type == "cpu" and cpu_has_bfloat16() and cpu_has_bfloat16_kernels()
    return "bf16" if half else "no"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively (x86 avx512_bf16 or amx_bf16, Arm bf16)."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> frozenset[str]:
    """The names of the CPU's instruction sets as Linux lists them, such as avx2 or amx_tile; none elsewhere."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), "").split())


def cpu_has_bfloat16_kernels() -> bool:
    """Whether oneDNN computes bfloat16 on this CPU (x86 with AVX-512, Arm with bf16), natively or not.

    Elsewhere torch's own kernels do: on a 2-core AMD EPYC with AVX2 a convolution 320 -> 320 of 64x64 took 34 s, and
    0.2 s in float32, with memory for nine copies of its input.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_memory(device: torch.device) -> int:
    """Approximate number of bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory(*, large: bool = False) -> None:
    """Make glibc keep memory that torch frees instead of returning it to the kernel page by page.

    Every step allocates the same buffers again. Above 32 MiB, the most for which glibc's threshold can be raised, they
    are still mapped and returned each time, as those of the VAE; with `large` they are taken from the heap, too, and
    from one heap, since those of other threads are small. The price is room between the buffers: with VAE decodes of
    320x320 in float32 on a 2-core AMD EPYC (Zen 3), in turns, page faults fell from 440-760 thousand to 0-40 thousand
    and the time to 0.86, and the peak rose from 1.2 to 1.6 GB. Without glibc nothing happens.
    """
    _mallopt({M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 2**31 - 1})
    if large:
        _mallopt({M_MMAP_MAX: 0, M_ARENA_MAX: 1})


def return_freed_memory(*, always: bool = False) -> None:
    """Return the memory that glibc keeps to the kernel, as after a model was unloaded; elsewhere nothing happens.

    With `always` also what is freed later, in blocks of 1 MiB and more: the opposite of `keep_freed_memory`, for work
    whose buffers are of many sizes, so that there is more room between them than in them.
    """
    if always:
        _mallopt({M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**20})
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
"""Of malloc.h."""


def _mallopt(values: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for name, value in values.items():
            mallopt(name, value)
