"""Ray: a cluster on this machine or one that exists, and the worker processes of a run. Nothing else imports Ray.

Ray is asked for processes on nodes, and to carry messages; what is tried again, and where, is not left to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sdcli.cluster.units import Attempt, FromWorker, Program, UnitEnded, WorkerDied
from sdcli.cluster.worker import ClusterWorker, versions
from sdcli.errors import SdcliError, UsageError, first_line

LOCAL = "local"
INSTALL = "--cluster needs Ray: pip install 'sdcli[cluster]'"
OLDEST = (2, 54)
"""Older versions have known holes (CVE-2026-27482)."""
OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory for Ray's object store, about its least: no images go through it."""
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_SESSION = re.compile(r"sdcli-ray-[0-9a-f]{6}")


@dataclass(frozen=True)
class ClusterSettings:
    """Which cluster, and the workers on it."""

    address: str = LOCAL
    """`local` starts one here, which ends with the run; HOST:PORT and `auto` name one that runs."""
    workers: int | None = None
    """None is as many as fit."""
    threads: int = 1
    """CPUs of each worker, and threads of torch."""
    gpus: float | None = None
    """GPUs of each worker; less than 1 lets several workers share one."""
    device: str = "auto"

    def check(self) -> None:
        """Raise UsageError for what cannot be, before anything is started."""
        if self.address not in (LOCAL, "auto") and not _ADDRESS.fullmatch(self.address):
            hint = ""
            if "://" in self.address:
                hint = "; start sdcli on a node of the cluster, as `ray job submit` does, with --cluster auto"
            raise UsageError(f"--cluster takes local, auto or HOST:PORT, not {self.address!r}{hint}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--cluster takes --device cpu or cuda, not {self.device}")
        if self.gpus is not None:
            if self.device == "cpu":
                raise UsageError("--gpus-per-worker has no effect with --device cpu")
            if self.gpus <= 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
                raise UsageError(f"--gpus-per-worker takes a number, such as 1 or 0.5; not {self.gpus:g}")


@dataclass
class _Process:
    """A worker process, and what it is to answer next."""

    handle: Any
    starting: Any = None
    """The reference of the answer to `start`."""
    running: Any = None
    """The generator of the messages of `run`."""

    @property
    def awaited(self) -> Any:
        return self.running if self.running is not None else self.starting


class RayEngine:
    """A connection to a cluster; a context manager. Used by one thread.

    Raises UsageError where Ray is missing or too old, or where the cluster has no room for a worker.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        settings.check()
        _check_ray()
        self._settings = settings
        self._ray: Any = None
        self._worker: Any = None
        """The class of the workers, as Ray has it."""
        self._processes: dict[int, _Process] = {}
        self._session: _Session | None = None
        self.seconds = 0.0
        """How long the cluster took to start."""
        self.device = "cpu"
        """`cpu` or `cuda`, the same for all workers."""
        self.workers = 0
        """How many workers there are to be."""

    def __enter__(self) -> Self:
        began = time.monotonic()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._connect()
        except SdcliError:
            self._disconnect()
            raise
        except Exception as error:
            self._disconnect()
            where = "Ray does not start" if self._is_local else f"no Ray cluster answers at {self._settings.address}"
            raise SdcliError(f"{where}: {first_line(error)}") from error
        except BaseException:  # Ctrl-C
            self._disconnect()
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # Ray has one for SIGTERM
                    signal.signal(number, handler)
        self.seconds = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    @property
    def _is_local(self) -> bool:
        return self._settings.address == LOCAL

    def start(self, number: int, program: Program) -> None:
        """Start the process of a worker, in place of an earlier one; `poll` says when it is ready, or why it is not."""
        self.kill(number)
        settings = self._settings
        worker = self._worker.options(
            num_cpus=settings.threads,
            num_gpus=(settings.gpus or 1) if self.device == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        handle = worker.remote()
        starting = handle.start.options(concurrency_group="work").remote(program, settings.threads, versions())
        self._processes[number] = _Process(handle, starting)

    def submit(self, number: int, attempt: Attempt) -> None:
        """Give a worker that is ready a unit; `poll` gives its messages, with UnitEnded or WorkerDied at the end."""
        process = self._processes[number]
        run = process.handle.run.options(concurrency_group="work", num_returns="streaming")
        process.running = run.remote(attempt)

    def cancel(self, number: int) -> None:
        """Tell a worker to stop what it does; it ends as usual."""
        self._processes[number].handle.cancel.remote()

    def kill(self, number: int) -> None:
        """End the process of a worker, if it has one."""
        process = self._processes.pop(number, None)
        if process is not None:
            with contextlib.suppress(Exception):
                self._ray.kill(process.handle, no_restart=True)

    def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]:
        """The messages that have come, by worker; waits for the first of them as long as that."""
        awaited = {
            process.awaited: number for number, process in self._processes.items() if process.awaited is not None
        }
        if not awaited:
            time.sleep(seconds)
            return
        ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=seconds, fetch_local=False)
        if ready and len(awaited) > 1:
            ready, _ = self._ray.wait(list(awaited), num_returns=len(awaited), timeout=0, fetch_local=False)
        for one in ready:
            number = awaited[one]
            process = self._processes.get(number)
            if process is not None and process.awaited == one:  # else it was killed meanwhile
                yield from ((number, message) for message in self._messages(number, process))

    def _messages(self, number: int, process: _Process) -> Iterator[FromWorker]:
        try:
            if process.running is None:
                answer = self._ray.get(process.starting)
                process.starting = None
            else:
                answer = self._ray.get(next(process.running))
                if isinstance(answer, UnitEnded):
                    process.running = None
        except StopIteration:
            yield self._died(number, "it stopped in the middle of its work")
        except self._ray.exceptions.RayError as error:
            yield self._died(number, _cause(error))
        else:
            yield answer

    def _died(self, number: int, cause: str) -> WorkerDied:
        self.kill(number)
        return WorkerDied(cause)

    def _connect(self) -> None:
        settings, options = self._settings, dict(_QUIET)
        if self._is_local:
            self._session = _Session()
            os.environ |= self._session.environment()
        self._ray = _import_ray()
        self._worker = self._ray.remote(concurrency_groups={"work": 1})(ClusterWorker)
        if self._session is not None:
            cpus = max(len(os.sched_getaffinity(0)), (settings.workers or 1) * settings.threads)
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            options |= {"object_store_memory": OBJECT_STORE, "_temp_dir": str(self._session.folder / "r")}
            options |= {"num_gpus": 0} if settings.device == "cpu" else {}
        else:
            options |= {"address": settings.address}
        self._ray.init(**options)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus_here = sum(node.get("GPU", 0) for node in nodes), sum(node.get("CPU", 0) for node in nodes)
        if settings.device == "cuda" and not gpus:
            raise UsageError("the cluster has no GPU; --device cpu does without")
        self.device = "cuda" if gpus and settings.device != "cpu" else "cpu"
        if self.device == "cpu" and settings.gpus is not None:
            raise UsageError("the cluster has no GPU, so --gpus-per-worker has no effect")
        share = settings.gpus or 1.0
        room = sum(_fitting(node, settings.threads, share if self.device == "cuda" else 0) for node in nodes)
        if not room and not self._is_local:
            raise UsageError(
                f"no node of the cluster has room for a worker: it needs {settings.threads} CPUs"
                + (f" and {share:g} GPUs" if self.device == "cuda" else "")
                + f", all nodes together have {cpus_here:g} CPUs and {gpus:g} GPUs"
            )
        if self.device == "cuda" and settings.workers is not None and settings.workers * share > gpus:
            raise UsageError(
                f"{settings.workers} workers need {settings.workers * share:g} GPUs, the cluster has {gpus:g}; "
                "--gpus-per-worker 0.5 lets two share one"
            )
        self.workers = settings.workers or max(1, int(room))

    def _disconnect(self) -> None:
        for number in list(self._processes):
            self.kill(number)
        if self._ray is not None:
            with contextlib.suppress(Exception):
                self._ray.shutdown()
        if self._session is not None:
            self._session.close()
            self._session = None


_QUIET: dict[str, Any] = {
    "configure_logging": False,
    "log_to_driver": False,
    "namespace": "sdcli",
}


def _check_ray() -> None:
    """Raise UsageError where Ray is missing or too old."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(INSTALL) from None
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise UsageError(f"Ray {version} is too old for --cluster: pip install 'sdcli[cluster]' brings a newer one")


def _import_ray() -> Any:
    """Ray, told to send nothing to its makers, and to say nothing on the terminal. Raises UsageError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # which it warns of
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ |= {"RAY_DEDUP_LOGS": "1", "RAY_DEDUP_LOGS_SKIP_REGEX": "^"}  # else it prints errors on stdout
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"{INSTALL} (it cannot be imported: {first_line(error)})") from None
    return ray


def _fitting(node: dict[str, float], cpus: int, gpus: float) -> int:
    """How many workers a node has room for."""
    by_cpu = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    count = node.get("GPU", 0)
    by_gpu = int(count) * int(1 / gpus + 1e-9) if gpus < 1 else int(count // gpus)
    return min(by_cpu, by_gpu)


def _cause(error: Exception) -> str:
    """Why a process is gone, in a few words, from Ray's long ones."""
    text = str(error)
    if "NODE_OUT_OF_MEMORY" in text or "low on memory" in text:
        return "Ray ended it as its node ran out of memory"
    if re.search(r"\bnode\b.{0,60}\b(?:has died|died|dead|terminated|drained|preempted)\b", text):
        return "its node is gone"
    if "SYSTEM_ERROR" in text:
        return "its process is gone, as after kill -9 or where the system ran out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


class _Session:
    """The folder of a local cluster's sockets and logs, removed when it ends, or by the next one if this is killed.

    Ray lets everyone into the folder that it gets, so that is one inside. It is in /tmp whatever TMPDIR says, as the
    path of a socket may have 107 bytes.
    """

    def __init__(self) -> None:
        root = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
        _sweep(root)
        self.folder = root / f"sdcli-ray-{secrets.token_hex(3)}"
        self.folder.mkdir(mode=0o700)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def environment(self) -> dict[str, str]:
        """Variables by which Ray listens on 127.0.0.1 alone, to processes that can read a token in this folder."""
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # a node that no other machine is to reach, as there
        return {**loopback, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _sweep(root: Path) -> None:
    """Remove the folders of clusters whose driver is dead: the kernel has dropped their locks."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(root)):
            if not _SESSION.fullmatch(entry.name) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(Path(entry.path, "lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(descriptor)
