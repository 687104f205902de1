"""The ASGI application: routes of all dialects, health, metrics, and one place where errors become answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from sdcli import __version__
from sdcli.models.registry import Registry
from sdcli.server.engine import Engine
from sdcli.server.guard import Guard
from sdcli.server.metrics import Metrics
from sdcli.server.native import ApiError, routes
from sdcli.server.settings import ServerSettings


def make_app(settings: ServerSettings, registry: Registry, **options: Any) -> tuple[Guard, Engine]:
    """The application and its engine, which starts and ends with it. `options` are those of `Engine`."""
    metrics = Metrics()
    engine = Engine(settings, metrics, **options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.drain()
        await engine.close()

    app = FastAPI(title="sdcli", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes(engine, registry))

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz(response: Response) -> str:
        response.status_code = 200 if engine.ready else 503
        return "ready\n" if engine.ready else "not ready\n"

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        headers = {"x-should-retry": "true" if error.retry else "false"}
        headers |= {"retry-after": str(error.retry)} if error.retry else {}
        body = {"type": error.kind, "message": str(error), "param": error.param}
        return JSONResponse({"error": body}, error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(
            {"error": {"type": "bad_request", "message": f"{where}: {first['msg']}".lstrip(": "), "param": where}}, 400
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error": {"type": "http", "message": str(error.detail), "param": None}}, error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        body = {"type": "internal", "message": "unexpected error; the log has it", "param": None}
        return JSONResponse({"error": body}, 500, headers={"x-should-retry": "false"})

    return Guard(app, settings), engine
