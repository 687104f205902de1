"""The native API: jobs of one or several images, their events as server-sent events, and their files.

POST   /v1/jobs                     a job: 202 with its id and place in the queue
GET    /v1/jobs/{id}                its state
GET    /v1/jobs/{id}/events         its events, from the first or from Last-Event-ID on
GET    /v1/jobs/{id}/images/{n}     a finished image, from 0
GET    /v1/jobs/{id}/preview        the newest latent preview
DELETE /v1/jobs/{id}                cancel it; again and later, it stays as it is
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from sdcli.errors import NotFound, UsageError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.images.formats import ImageFormat
from sdcli.models.registry import Registry
from sdcli.request.jobs import Line
from sdcli.server.engine import Draining, Engine
from sdcli.server.fair_queue import QueueFull
from sdcli.server.jobs import Job
from sdcli.server.known_names import check_known, default_model, is_known_model
from sdcli.server.remote_fields import remote_fields, upload_size
from sdcli.server.settings import ServerSettings

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class JobBody(BaseModel):
    """A job: one request, or several under `requests`. Fields of a request are those of a line of a prompts file."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    """The same fields as in JSONL: prompt, negative_prompt, seed, steps, num_images ..."""
    format: ImageFormat = "png"
    previews: Annotated[float | None, Field(ge=0.1, le=3600)] = None
    """Seconds between latent previews; none if omitted."""
    cancel_on_disconnect: bool = False
    """Cancel the job when the client that follows its events goes away."""


class JobView(BaseModel):
    """The state of a job."""

    id: str
    state: Literal["queued", "running", "done", "partial", "failed", "cancelled"]
    place: int | None
    """Its place in the queue, from 1."""
    progress: float
    seconds_left: float | None
    images: list[ImageView]
    expires: float | None
    """Seconds since 1970 when the images are dropped."""


class ImageView(BaseModel):
    """One image of a job."""

    state: Literal["waiting", "done", "failed", "cancelled"]
    url: str | None = None
    seed: int
    seconds: float | None = None
    kind: str | None = None
    error: str | None = None
    request: dict[str, Any] | None = None


class ApiError(Exception):
    """An answer with a status and a sentence; each dialect gives it its own body."""

    def __init__(self, status: int, kind: str, sentence: str, *, param: str | None = None, retry: int | None = None):
        super().__init__(sentence)
        self.status, self.kind, self.param, self.retry = status, kind, param, retry


def resolve_images(
    requests: list[dict[str, Any]], registry: Registry, settings: ServerSettings
) -> tuple[ResolvedJob, ...]:
    """Requests as they came -> resolved jobs, counted from 0. Raises ApiError. Reads files, so it runs in a thread."""
    try:
        safe = [_safe(fields, registry, settings) for fields in requests]
    except UsageError as error:
        raise ApiError(400, "bad_request", str(error)) from None
    except NotFound as error:
        raise ApiError(404, "not_found", str(error)) from None
    lines = [Line(number, fields) for number, fields in enumerate(safe, start=1 if len(safe) > 1 else 0)]
    found: list[ResolvedJob] = []
    for job in expand(
        lines,
        {},
        registry,
        num_images=1,
        base_seed=secrets.randbelow(2**32),
        measure=upload_size,
        lora_dir=settings.run.lora_dir,
    ):
        if isinstance(job, BadJob):
            status = 400 if isinstance(job.error, UsageError) else 404
            raise ApiError(status, "bad_request" if status == 400 else "not_found", str(job.error))
        width, height = job.request.final_size
        if width * height > settings.max_pixels:
            raise ApiError(400, "bad_request", f"{width}x{height} is more than {settings.max_pixels} pixels")
        found.append(ResolvedJob(**{**vars(job), "index": len(found)}))
        if len(found) > settings.max_images:
            raise ApiError(400, "bad_request", f"a job has at most {settings.max_images} images here")
    return tuple(found)


def _safe(fields: dict[str, Any], registry: Registry, settings: ServerSettings) -> dict[str, Any]:
    """The fields of a request with images in memory, names that are known, and a model. Raises UsageError, NotFound."""
    model = fields.get("model")
    rest = {name: value for name, value in fields.items() if name != "model"}
    known = model is None or is_known_model(model, registry, settings)
    safe = remote_fields(rest if known else fields, max_pixels=settings.max_pixels)
    check_known(safe, registry, settings)
    return {**safe, "model": default_model(registry, settings) if model is None else model}


async def submit(
    engine: Engine, registry: Registry, request: Request, requests: list[dict[str, Any]], **wishes: Any
) -> Job:
    """Resolve requests and queue them as one job. Raises ApiError."""
    images = await asyncio.to_thread(resolve_images, requests, registry, engine.settings)
    job = Job(f"job-{secrets.token_hex(12)}", client_of(request), images, **wishes)
    try:
        engine.submit(job)
    except QueueFull:
        sentence = f"the queue is full ({engine.settings.max_queue} jobs)"
        raise ApiError(429, "queue_full", sentence, retry=engine.retry_after()) from None
    except Draining:
        raise ApiError(503, "stopping", "the server is stopping", retry=30) from None
    return job


def client_of(request: Request) -> str:
    """Who takes turns in the queue: an address."""
    return request.client.host if request.client is not None else "local"


def routes(engine: Engine, registry: Registry) -> APIRouter:
    """The routes of the native API."""
    router = APIRouter(tags=["jobs"])

    def find(id: str) -> Job:
        job = engine.store.find(id)
        if job is None:
            gone = engine.store.was_there(id)
            raise ApiError(
                410 if gone else 404,
                "gone" if gone else "not_found",
                "the images of this job have been dropped" if gone else "no such job",
            )
        return job

    @router.post("/v1/jobs", status_code=202)
    async def create(body: JobBody, request: Request, response: Response) -> JobView:
        wishes = {"format": body.format, "preview_every": body.previews, "tied": body.cancel_on_disconnect}
        job = await submit(engine, registry, request, body.requests, **wishes)
        response.headers["location"] = f"/v1/jobs/{job.id}"
        return view(job, engine)

    @router.get("/v1/jobs/{id}")
    async def state(id: str) -> JobView:
        return view(find(id), engine)

    @router.delete("/v1/jobs/{id}")
    async def cancel(id: str) -> JobView:
        job = find(id)
        engine.cancel(job)
        return view(job, engine)

    @router.get("/v1/jobs/{id}/events", response_class=EventSourceResponse)
    async def events(
        id: str, request: Request, last_event_id: Annotated[int | None, Header(ge=0)] = None
    ) -> AsyncIterator[ServerSentEvent]:
        job = find(id)
        first = 0 if last_event_id is None else last_event_id + 1
        try:
            async for number, event in job.follow(first):
                yield ServerSentEvent(data=_with_urls(job, event), event=event["type"], id=str(number))
        finally:
            if job.tied and not job.over:
                engine.cancel(job, why="the client went away")

    @router.get("/v1/jobs/{id}/images/{number}", response_class=Response)
    async def image(id: str, number: int) -> Response:
        job = find(id)
        if number in job.failed:
            raise ApiError(409, job.failed[number].kind, job.failed[number].sentence)
        if number not in job.done:
            there = 0 <= number < len(job.images)
            raise ApiError(409 if there else 404, "not_ready" if there else "not_found", "this image is not there")
        return Response(job.done[number].data, media_type=MEDIA_TYPES[job.format])

    @router.get("/v1/jobs/{id}/preview", response_class=Response)
    async def preview(id: str) -> Response:
        job = find(id)
        if job.preview is None:
            raise ApiError(404, "not_found", "there is no preview")
        return Response(job.preview.data, media_type="image/png", headers={"cache-control": "no-store"})

    return router


def view(job: Job, engine: Engine) -> JobView:
    """A job as the API shows it."""
    return JobView(
        id=job.id,
        state=job.state,
        place=engine.place(job),
        progress=round(job.progress, 4),
        seconds_left=job.seconds_left,
        images=[_image_view(job, number) for number in range(len(job.images))],
        expires=None if job.ended is None else job.ended + engine.store.keep,
    )


def _image_view(job: Job, number: int) -> ImageView:
    seed = job.images[number].request.seed
    if number in job.done:
        done = job.done[number]
        url = f"/v1/jobs/{job.id}/images/{number}"
        return ImageView(state="done", url=url, seed=seed, seconds=done.seconds, request=done.request)
    if number in job.failed:
        failed = job.failed[number]
        state: Literal["cancelled", "failed"] = "cancelled" if failed.kind == "cancelled" else "failed"
        return ImageView(state=state, seed=seed, kind=failed.kind, error=failed.sentence)
    return ImageView(state="waiting", seed=seed)


def _with_urls(job: Job, event: dict[str, Any]) -> dict[str, Any]:
    match event["type"]:
        case "image":
            return {**event, "url": f"/v1/jobs/{job.id}/images/{event['image']}"}
        case "preview":
            return {**event, "url": f"/v1/jobs/{job.id}/preview"}
    return event


JobView.model_rebuild()
