"""Calls that wait for their images: until the job is over, or until the client goes away, which cancels it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request

from sdcli.server.engine import Engine
from sdcli.server.event_stream import paced
from sdcli.server.jobs import Job
from sdcli.server.native import ApiError
from sdcli.server.protocol import ImageFailed

GONE = "the client went away"


class ClientGone(Exception):
    """The client closed the connection of a blocking call; nobody is left to read the answer."""


class JobFailed(ApiError):
    """An image that was worked on and failed: sent again, it would be generated again, and most likely fail again."""


async def wait_for(job: Job, engine: Engine, request: Request) -> None:
    """Return when the job is over.

    Raises ClientGone when the client closes the connection first; its job is cancelled then, because nobody else can
    fetch the images of a blocking call. The body of the request must have been read.
    """
    over = asyncio.ensure_future(job.wait())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        over.cancel()
        gone.cancel()
        engine.cancel(job, why=GONE)  # does nothing to one that is over
    if not over.done() or over.cancelled():
        raise ClientGone


async def followed(job: Job, engine: Engine, *, pause: float) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The events of a job until it is over, and None after each `pause` without one, in which to show a sign of life.

    A consumer that stops before the end cancels the job.
    """
    try:
        async with contextlib.aclosing(paced(job.follow(), pause)) as events:
            async for one in events:
                yield None if one is None else one[1]
    finally:
        engine.cancel(job, why=GONE)


def failure_of(job: Job, engine: Engine, failed: ImageFailed) -> JobFailed:
    """What an image that failed is answered with."""
    number = f"image {failed.image + 1} of {len(job.images)}: " if len(job.images) > 1 else ""
    sentence = f"{number}{failed.sentence}"
    match failed.kind:
        case "bad_request" | "not_found":
            return JobFailed(400, "bad_request", sentence)
        case "flagged":
            return JobFailed(400, "content_policy_violation", sentence)
        case "out_of_memory":
            return JobFailed(503, "out_of_memory", sentence, retry=engine.retry_after())
        case "cancelled" if engine.draining:
            return JobFailed(503, "stopping", sentence, retry=30)
        case "cancelled":
            return JobFailed(409, "cancelled", sentence)
        case "timeout":
            return JobFailed(504, "timeout", sentence)
        case "worker_died":
            return JobFailed(503, "worker_died", sentence, retry=engine.retry_after())
    return JobFailed(500, "generation_failed", sentence)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
