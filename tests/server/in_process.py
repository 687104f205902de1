"""The application without worker processes, called in this process: its jobs stay in the queue."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from PIL import Image

from sdcli.models.registry import load_registry
from sdcli.server.app import make_app
from sdcli.server.engine import Engine
from sdcli.server.settings import ServerSettings

URL = "http://127.0.0.1:7860"


@asynccontextmanager
async def application(**settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Engine]]:
    """A client of the application, and its engine."""
    app, engine = make_app(ServerSettings(**settings), load_registry())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=URL) as http:
        yield http, engine


@asynccontextmanager
async def neighbour(http: httpx.AsyncClient, address: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the same application with another address."""
    app = http._transport.app  # type: ignore[attr-defined]
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url=URL) as other:
        yield other


def answers(*requests: dict[str, Any], **settings: Any) -> list[httpx.Response]:
    """The answers to requests, given as httpx has them, one after the other."""

    async def ask() -> list[httpx.Response]:
        async with application(**settings) as (http, _):
            return [await http.request(**{"method": "GET", **request}) for request in requests]

    return asyncio.run(ask())


def answer(url: str, **request: Any) -> httpx.Response:
    return answers({"url": url, **request})[0]


def job_of(**fields: Any) -> dict[str, Any]:
    """The request that submits a job of one image by `tiny`."""
    return {"method": "POST", "url": "/v1/jobs", "json": {"requests": {"model": "tiny", "prompt": "x", **fields}}}


def png(width: int, height: int) -> str:
    """An image as requests hold it."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
