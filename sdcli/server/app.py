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
from sdcli.server import a1111, openai_images
from sdcli.server.blocking import ClientGone, JobFailed
from sdcli.server.dialects import dialect_of, error_answer, validation_problem
from sdcli.server.engine import Engine
from sdcli.server.forms import form_routes
from sdcli.server.guard import Guard
from sdcli.server.metrics import CONTENT_TYPE, Metrics
from sdcli.server.native import ApiError, routes
from sdcli.server.page.files import page_routes
from sdcli.server.settings import ServerSettings
from sdcli.server.warm.listener import CommandListener


def make_app(settings: ServerSettings, registry: Registry, **options: Any) -> tuple[Guard, Engine]:
    """The application and its engine, which starts and ends with it. `options` are those of `Engine`."""
    metrics = Metrics()
    engine = Engine(settings, metrics, **options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        commands = CommandListener(settings, can_lend=lambda: engine.can_lend, lend=engine.lend)
        commands.open()
        yield
        commands.close()
        await engine.drain()
        await engine.close()

    app = FastAPI(title="sdcli", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes(engine, registry))
    app.include_router(openai_images.routes(engine, registry))
    app.include_router(a1111.routes(engine, registry))
    app.include_router(form_routes(settings, registry))
    app.include_router(page_routes())

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz(response: Response) -> str:
        response.status_code = 200 if engine.ready else 503
        return "ready\n" if engine.ready else "not ready\n"

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return error_answer(
            request.url.path,
            error.status,
            error.kind,
            str(error),
            param=error.param,
            retry_after=error.retry,
            should_retry=error.retry is not None and not isinstance(error, JobFailed),
        )

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # for the log; nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        where, sentence = validation_problem(error.errors())
        status = 422 if dialect_of(request.url.path) == "a1111" else 400
        return error_answer(request.url.path, status, "bad_request", sentence, param=where or None)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        path, sentence = request.url.path, str(error.detail)
        return error_answer(path, error.status_code, "http", sentence, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return error_answer(request.url.path, 500, "internal", "unexpected error; the log has it")

    return Guard(app, settings, metrics.answered), engine
