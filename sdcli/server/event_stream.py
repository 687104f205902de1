"""Server-sent events: their bytes, and a response that closes their source when the client goes away.

FastAPI's own response for them leaves the source open where the client goes away while an event waits to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

SIGN_OF_LIFE = 15.0
"""Seconds after which a stream without an event sends a comment, so that no proxy ends it."""
STILL_WORKING = b": still working\n\n"
"""The comment."""

T = TypeVar("T")


class EventStream(StreamingResponse):
    """A response of events, which are encoded already. What `source` does in its `finally` is done at the end."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], status_code: int = 200) -> None:
        # FastAPI reads the status code of its OpenAPI description from this signature.
        super().__init__(source, status_code, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


def event_bytes(type: str, data: dict[str, Any], *, id: int | None = None) -> bytes:
    """An event as the protocol writes it."""
    number = "" if id is None else f"id: {id}\n"
    return f"event: {type}\ndata: {json.dumps(data)}\n{number}\n".encode()


async def paced(events: AsyncIterator[T], pause: float) -> AsyncGenerator[T | None, None]:
    """The events, and None after each `pause` seconds without one."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=pause)
            if not done:
                yield None
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
