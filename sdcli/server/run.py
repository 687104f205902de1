"""Runs a server in this process until a signal ends it: listens, logs, and drains."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from sdcli.errors import CannotWrite, Interrupted, NotFound, Offline, OutOfMemory, SdcliError, Terminated, UsageError
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import Registry
from sdcli.request.schema import GenerationRequest
from sdcli.server.app import make_app
from sdcli.server.engine import Engine
from sdcli.server.guard import Guard
from sdcli.server.http_connection import HttpConnection
from sdcli.server.protocol import Unusable
from sdcli.server.settings import ServerSettings


def run_server(settings: ServerSettings, registry: Registry) -> None:
    """Serve until SIGINT or SIGTERM. A SIGTERM that ends the server in order is no error.

    Raises UsageError and NotFound for models to preload and for devices, CannotWrite, and Interrupted.
    """
    settings, registry = _with_preloaded(settings, registry)
    preload = tuple(_job_of(name, registry) for name in settings.preload)
    _log_to_stderr(settings)
    app, engine = make_app(settings, registry, preload=preload)
    listening = _listen(settings)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}", flush=True)
    server = _Server(http_config(app), engine)
    try:
        server.run(sockets=[listening])
    finally:
        engine.kill()
    if server.problem is not None:
        raise server.problem
    if server.reason is not None and (server.force_exit or not isinstance(server.reason, Terminated)):
        raise server.reason


def http_config(app: Guard) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        http=HttpConnection,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # X-Forwarded-For is what a client says of itself, and would buy it turns and others' jobs
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )


class _Server(uvicorn.Server):
    """uvicorn's server that lets the running jobs finish at the first signal, and ends at the second one.

    Until then it still answers: new jobs with 503 and Retry-After, and the events of running ones.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        engine.on_unusable = self._give_up
        self._loop: asyncio.AbstractEventLoop | None = None
        self.reason: Interrupted | None = None
        self.problem: SdcliError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self.reason is not None
        self.reason = Terminated("terminated") if sig == signal.SIGTERM else Interrupted("interrupted")
        if again or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        await self._engine.drain()
        self.should_exit = True

    def _give_up(self, report: Unusable) -> None:
        kinds = {kind.exit_code: kind for kind in (UsageError, NotFound, Offline, OutOfMemory)}
        self.problem = self.problem or kinds.get(report.exit_code, SdcliError)(report.sentence)
        self.should_exit = True


def _with_preloaded(settings: ServerSettings, registry: Registry) -> tuple[ServerSettings, Registry]:
    """The registry with the models of `--model` that are given as paths, under the names of their files.

    Raises UsageError where such a name is taken.
    """
    names, added = [], {}
    for given in settings.preload:
        name = given
        if given not in registry.models:
            spec, name = registry.find(given), Path(given).resolve().name.removesuffix(".safetensors")
            if name in registry.models or name in added:
                raise UsageError(f"--model {given}: there is another model {name!r}; rename one of them")
            added[name] = spec.model_copy(update={"name": name})  # which is what requests and records have
        names.append(name)
    models = {**registry.models, **added}
    default = names[0] if names else registry.default
    return replace(settings, preload=tuple(names)), registry.model_copy(update={"models": models, "default": default})


def _job_of(name: str, registry: Registry) -> ResolvedJob:
    spec = registry.find(name)
    spec.require_supported()
    return ResolvedJob(0, resolve(GenerationRequest(prompt="", seed=0, model=name), spec), spec)


def _listen(settings: ServerSettings) -> socket.socket:
    try:
        listening = socket.create_server((settings.host, settings.port), family=_family(settings.host), backlog=512)
    except OSError as error:
        raise CannotWrite(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None
    # asyncio sets it only where a socket's protocol is given; without it an answer can wait 40 ms for the client's ACK
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _log_to_stderr(settings: ServerSettings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if settings.log == "json" else logging.Formatter("%(asctime)s %(message)s"))
    for name in ("sdcli.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name.startswith("sdcli") else logging.WARNING)
        logger.propagate = False


class _JsonLines(logging.Formatter):
    """A line of JSON; messages that are JSON objects already are merged into it."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        facts = json.loads(text) if text.startswith("{") else {"message": text}
        return json.dumps({"time": self.formatTime(record), "level": record.levelname.lower(), **facts})
