"""A pickled checkpoint to safetensors, opened in a process that has little time, memory and nothing to steal."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, CannotWrite, NotFound, UsageError
from sdcli.io.files import PACKAGE, whole_file
from sdcli.io.stand_ins import stand_in

DEFAULT_TIMEOUT_S = 600.0
MAX_NESTING = 8
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "string_to_param")
"""Keys under which trainers keep the weights beside their own state; the last is that of A1111's embeddings."""
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "typing.")
"""Packages whose objects stand beside the weights in old checkpoints, Stable Diffusion 1.4's among them."""
MAX_TRAINER_CLASSES = 40
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG")
_FORBIDDEN_EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.")


@dataclass(frozen=True)
class Converted:
    """What was written: the file, the number of tensors, their bytes, and the entries that are not tensors."""

    file: Path
    tensors: int
    total_bytes: int
    left_out: tuple[str, ...]


def convert(
    source: Path, target: Path, *, overwrite: bool, timeout_s: float = DEFAULT_TIMEOUT_S, memory_gb: float | None = None
) -> Converted:
    """Load a pickle with weights_only in a limited process and write its tensors as safetensors.

    `memory_gb` is beyond what torch itself takes; None means 2 GB and four times the file.
    Raises NotFound, UsageError, BadWeights (a sentence for each way to fail) and CannotWrite.
    """
    if not source.exists():
        raise NotFound(f"no file {source}")
    if not source.is_file():
        raise UsageError(f"{source} is not a regular file")
    if (instead := stand_in(source)) is not None:
        raise BadWeights(instead)
    if target.suffix != ".safetensors":
        raise UsageError(f"{target} should end in .safetensors")
    if _is_safetensors(source):
        raise UsageError(f"{source} is a safetensors file already; rename it to use it")
    memory = int(memory_gb * 1e9) if memory_gb is not None else 2 * 10**9 + 4 * source.stat().st_size
    with whole_file(target, overwrite=overwrite) as temporary:
        report = _in_a_limited_process(source.resolve(), temporary.absolute(), timeout_s=timeout_s, memory=memory)
    return Converted(target, report["tensors"], report["bytes"], tuple(report["left_out"]))


def _is_safetensors(file: Path) -> bool:
    with open(file, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") + 8 <= file.stat().st_size


def _in_a_limited_process(source: Path, temporary: Path, *, timeout_s: float, memory: int) -> dict[str, Any]:
    package = str(PACKAGE.parent)
    start = f"import sys; sys.path.insert(0, {package!r}); from sdcli.models.convert import child; child(sys.argv[1:])"
    # -I: no PYTHON* variables, no current folder; the environment is a short list, so no tokens and no keys.
    command = [sys.executable, "-I", "-c", start, str(source), str(temporary), str(timeout_s), str(memory)]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=temporary.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadWeights(
            f"{source.name} was not read within {timeout_s:g} s, so it was given up (--timeout gives it longer)"
        ) from None
    if done.returncode in (-getattr(signal, "SIGXCPU", 24), -9):
        raise BadWeights(f"{source.name} took more time or memory than it was given, so it was given up")
    try:
        report: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    except (ValueError, IndexError):
        raise BadWeights(f"{source.name} broke the process that read it (code {done.returncode})") from None
    if report.get("disk_full"):
        raise CannotWrite(f"the disk of {temporary.parent} is full; nothing was written")
    if "error" in report:
        raise BadWeights(f"{source.name}: {report['error']}")
    return report


def child(arguments: list[str]) -> None:
    """The limited process: SOURCE TEMPORARY TIMEOUT_S MEMORY_BYTES -> one JSON line on stdout."""
    source, temporary, timeout_s, memory = arguments
    _leave_the_network()
    import torch
    from safetensors.torch import save_file

    _limit(cpu_s=float(timeout_s), memory=int(memory))
    try:
        tensors, left_out = _tensors(_unwrapped(_load(source, torch)), torch)
        save_file(tensors, temporary, metadata={"format": "pt"})
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        report: dict[str, Any] = {"tensors": len(tensors), "bytes": total, "left_out": left_out}
    except _Refused as refused:
        report = {"error": str(refused)}
    except (MemoryError, RuntimeError, OverflowError) as error:
        report = {"error": _told(error, memory=int(memory))}
    except Exception as error:
        full = "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        report = {"disk_full": full, "error": f"cannot be converted: {type(error).__name__}: {_first_line(error)}"}
    print(json.dumps(report), flush=True)


class _Refused(Exception):
    """A checkpoint that cannot be converted, with a sentence that does not name the file."""


def _leave_the_network() -> None:
    """Move this process to an empty network of its own where the kernel lets it (Linux, before any thread starts)."""
    new_user, new_network = 0x10000000, 0x40000000
    with contextlib.suppress(OSError, AttributeError, ValueError):
        unshare = ctypes.CDLL(None).unshare
        if unshare(new_network) != 0:
            unshare(new_user | new_network)


def _limit(*, cpu_s: float, memory: int) -> None:
    """From here on: at most so much more memory and processor time, no core file, no network, no other program.

    The audit hook stops Python code. `weights_only` is the first wall; this one is for the day it is found broken.
    """

    def refuse(event: str, _: Any) -> None:
        if event.startswith(_FORBIDDEN_EVENTS):
            raise PermissionError(f"{event} is not allowed while a checkpoint is opened")

    sys.addaudithook(refuse)
    try:
        import resource
    except ImportError:  # Windows has no such limits: the time limit of the parent is all there is
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(cpu_s * (os.cpu_count() or 1)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    taken = Path("/proc/self/statm")
    if taken.exists():  # elsewhere the address space already taken is unknown, and macOS ignores the limit anyway
        limit = int(taken.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _load(source: str, torch: Any) -> Any:
    """The unpickled content; a trainer's own objects become empty ones, and every other class is refused."""
    harmless: list[tuple[type, str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(harmless):
                return _weights_only(source, torch)
        except Exception as error:
            if isinstance(error, MemoryError) or "allocate" in str(error):
                raise
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if wanted is None:
                raise _Refused("is not a checkpoint that torch can read") from None
            if not wanted[1].startswith(TRAINERS) or len(harmless) == MAX_TRAINER_CLASSES:
                raise _Refused(f"wants to run {wanted[1][:80]}, which weights never need; refused") from None
            harmless.append((type("Empty", (_Empty,), {}), wanted[1]))


class _Empty:
    """Stands for a trainer's object: takes everything, keeps nothing."""

    def __new__(cls, *_: Any) -> _Empty:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _weights_only(source: str, torch: Any) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # torch.save's format from before 1.6 cannot be mapped
            raise
        return torch.load(source, map_location="cpu", weights_only=True)


def _unwrapped(found: Any) -> dict[Any, Any]:
    """The mapping that holds the tensors, under the trainers' wrappers; bounded, for a mapping may hold itself."""
    seen: set[int] = set()
    for _ in range(MAX_NESTING):
        if not isinstance(found, dict):
            raise _Refused(f"holds a {type(found).__name__}, and a mapping of names to tensors was expected")
        if id(found) in seen:
            raise _Refused("refers to itself, which no weights do; refused")
        seen.add(id(found))
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            return found
        found = inner
    raise _Refused(f"is nested more than {MAX_NESTING} levels deep")


def _tensors(found: dict[Any, Any], torch: Any) -> tuple[dict[str, Any], list[str]]:
    """The dense tensors by name, contiguous and none sharing memory with another, and the names of the rest."""
    tensors, left_out = {}, []
    for name, value, alone in _with_sharing(found, torch):
        if alone is None:
            left_out.append(str(name)[:80])
        else:
            tensors[name] = value.contiguous() if alone else value.clone(memory_format=torch.contiguous_format)
    if not tensors:
        raise _Refused("holds no tensors")
    return tensors, left_out


def _with_sharing(found: dict[Any, Any], torch: Any) -> Iterator[tuple[Any, Any, bool | None]]:
    """Each entry with whether it alone uses the whole of its storage; None for one that is not a dense tensor."""
    users: dict[int, int] = {}
    for value in found.values():
        if _is_dense(value, torch):
            users[value.untyped_storage().data_ptr()] = users.get(value.untyped_storage().data_ptr(), 0) + 1
    for name, value in found.items():
        if not isinstance(name, str) or not _is_dense(value, torch):
            yield name, value, None
        else:
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            yield name, value.detach(), whole and users[value.untyped_storage().data_ptr()] == 1


def _is_dense(value: Any, torch: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def _told(error: BaseException, *, memory: int) -> str:
    text = str(error).lower()
    if isinstance(error, MemoryError | OverflowError) or "allocate" in text or "memory" in text or "overflow" in text:
        return f"needs more than the {memory / 1e9:.1f} GB of memory it was given (--memory gives it more)"
    return f"cannot be converted: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
