"""OpenAI's images API: generations, edits, and the models, for every client library of that API.

POST /v1/images/generations         JSON; with `stream` server-sent events with true partial images
POST /v1/images/edits               a form with an image, and a mask whose transparent part is generated anew
GET  /v1/images/files/{name}        an image of an answer with `response_format: url`
GET  /v1/models, /v1/models/{id}    the models that are on this machine
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response

from sdcli.images.formats import SUFFIX_OF
from sdcli.models.registry import Registry
from sdcli.server.blocking import failure_of, followed, wait_for
from sdcli.server.dialects import error_body
from sdcli.server.engine import Engine
from sdcli.server.event_stream import SIGN_OF_LIFE, STILL_WORKING, EventStream, event_bytes
from sdcli.server.jobs import Job
from sdcli.server.model_names import check_model, models_here
from sdcli.server.native import MEDIA_TYPES, ApiError, submit
from sdcli.server.openai_edits import check_repeated, edit_fields
from sdcli.server.openai_models import (
    AnswerImage,
    EditForm,
    ImageBody,
    ImagesAnswer,
    ModelAnswer,
    ModelList,
    OpenAIError,
    Usage,
)

_FAILURES = {400: "refused", 401: "no token", 404: "no such model", 413: "too large", 429: "the queue is full"}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: {"model": OpenAIError, "description": text} for status, text in _FAILURES.items()},
    409: {"model": OpenAIError, "description": "cancelled"},
    500: {"model": OpenAIError, "description": "failed; it is not to be sent again"},
    503: {"model": OpenAIError, "description": "out of memory, or the server is stopping"},
}
_WITH_STREAM: dict[int | str, dict[str, Any]] = {
    **_RESPONSES,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "the images"},
}


def routes(engine: Engine, registry: Registry) -> APIRouter:
    """The routes of the dialect."""
    router = APIRouter(tags=["OpenAI"])
    settings, began, links = engine.settings, int(time.time()), _Links()

    @router.post("/v1/images/generations", responses=_WITH_STREAM, response_model_exclude_none=True)
    async def generations(body: ImageBody, request: Request) -> ImagesAnswer:
        return await answer(body, body.fields(), request, "image_generation")  # type: ignore[return-value]

    @router.post("/v1/images/edits", responses=_WITH_STREAM, response_model_exclude_none=True)
    async def edits(
        form: Annotated[EditForm, Form(media_type="multipart/form-data")], request: Request
    ) -> ImagesAnswer:
        check_repeated(await request.form())
        fields = await edit_fields(form, max_pixels=settings.max_upload_pixels)
        return await answer(form, fields, request, "image_edit")  # type: ignore[return-value]

    async def answer(body: ImageBody, fields: dict[str, Any], request: Request, kind: str) -> ImagesAnswer | Response:
        if body.model:
            fields = {**fields, "model": check_model(body.model, registry, settings)}
        wishes = {"format": body.format, "quality": body.encoder_quality, "partial_images": body.partial_images or 0}
        job = await submit(engine, registry, request, [fields], **wishes)
        if body.stream:
            return EventStream(_events(job, engine, kind))
        await wait_for(job, engine, request)
        for failed in job.failed.values():
            raise failure_of(job, engine, failed)
        by_address = body.response_format == "url"
        base = _base_url(request)
        data = [
            AnswerImage(url=f"{base}{links.path(job, number)}", seed=one.request.seed)
            if by_address
            else AnswerImage(b64_json=await asyncio.to_thread(_base64, job.done[number].data), seed=one.request.seed)
            for number, one in enumerate(job.images)
        ]
        return ImagesAnswer(created=int(time.time()), data=data, output_format=job.format, size=_size(job))

    @router.get(
        "/v1/images/files/{name}", response_class=Response, responses={404: _RESPONSES[404], 410: _RESPONSES[404]}
    )
    async def file(name: str) -> Response:
        id, number = links.read(name)
        job = engine.store.find(id)
        if job is None or number not in job.done:
            raise ApiError(410, "gone", "this image has been dropped")
        return Response(job.done[number].data, media_type=MEDIA_TYPES[job.format])

    @router.get("/v1/models", responses={401: _RESPONSES[401]})
    async def models() -> ModelList:
        names = await asyncio.to_thread(models_here, registry, settings)
        return ModelList(data=[ModelAnswer(id=name, created=began) for name in names])

    @router.get("/v1/models/{id}", responses={401: _RESPONSES[401], 404: _RESPONSES[404]})
    async def model(id: str) -> ModelAnswer:
        return ModelAnswer(id=check_model(id, registry, settings), created=began)

    return router


def _base_url(request: Request) -> str:
    """The server's address as the client has it: behind a proxy with TLS, which says so, it begins with https."""
    by_tls = request.headers.get("x-forwarded-proto", "").lower() == "https"
    return str(request.base_url.replace(scheme="https") if by_tls else request.base_url).rstrip("/")


async def _events(job: Job, engine: Engine, kind: str) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a job of one image: partial images, then the image or an error, then the end."""
    sent = 0
    shared = {"size": _size(job), "quality": "auto", "background": "opaque", "output_format": job.format}
    async with contextlib.aclosing(followed(job, engine, pause=SIGN_OF_LIFE)) as events:
        async for event in events:
            if event is None:
                yield STILL_WORKING
            while sent < len(job.partials):
                partial = {"partial_image_index": sent, "b64_json": _base64(job.partials[sent].data)}
                yield _event(f"{kind}.partial_image", {**partial, "created_at": int(time.time()), **shared})
                sent += 1
    if job.done:
        image = {"b64_json": _base64(job.done[0].data), "created_at": int(time.time()), **shared}
        more = {"usage": Usage().model_dump(), "seed": job.images[0].request.seed}
        yield _event(f"{kind}.completed", {**image, **more})
    else:
        error = failure_of(job, engine, job.failed[0])
        yield _event("error", error_body("/v1/images/generations", error.status, error.kind, str(error)))
    yield b"data: [DONE]\n\n"


def _event(type: str, data: dict[str, Any]) -> bytes:
    return event_bytes(type, {"type": type, **data})


def _size(job: Job) -> str:
    width, height = job.images[0].request.final_size
    return f"{width}x{height}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _Links:
    """Addresses of images that work without the token, and that nobody can make up: they end in a signature."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def path(self, job: Job, number: int) -> str:
        return f"/v1/images/files/{job.id}.{number}.{self._signature(job.id, number)}{SUFFIX_OF[job.format]}"

    def read(self, name: str) -> tuple[str, int]:
        """(job, image) of a name. Raises ApiError for one that is not from here."""
        match = re.fullmatch(r"(job-[0-9a-f]+)\.([0-9]{1,6})\.([0-9a-f]{32})\.[a-z]+", name)
        if not match or not hmac.compare_digest(self._signature(match[1], int(match[2])), match[3]):
            raise ApiError(404, "not_found", "there is no such image")
        return match[1], int(match[2])

    def _signature(self, id: str, number: int) -> str:
        return hmac.digest(self._secret, f"{id}.{number}".encode(), "sha256").hex()[:32]
