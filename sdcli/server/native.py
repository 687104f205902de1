"""The native API: jobs of one or several images, their events as server-sent events, and their files.

POST   /v1/jobs                     a job: 202 with its id and place in the queue
GET    /v1/jobs/{id}                its state
GET    /v1/jobs/{id}/events         its events, from the first or from Last-Event-ID on
GET    /v1/jobs/{id}/images/{n}     a finished image, from 0
GET    /v1/jobs/{id}/preview        the newest latent preview, /images/{n}/preview that of one image
GET    /v1/jobs/{id}/partials/{n}   an image decoded along the way, from 0
DELETE /v1/jobs/{id}                cancel it; again and later, it stays as it is
DELETE /v1/jobs/{id}/images/{n}     cancel one image of it
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sdcli.errors import NotFound, SdcliError, UsageError
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.images.formats import SUFFIX_OF, ImageFormat
from sdcli.models.registry import Registry
from sdcli.request.jobs import Line
from sdcli.request.prompt_options import whole_count
from sdcli.server.engine import Draining, Engine
from sdcli.server.event_stream import SIGN_OF_LIFE, STILL_WORKING, EventStream, event_bytes, paced
from sdcli.server.fair_queue import QueueFull
from sdcli.server.jobs import Job
from sdcli.server.protocol import PreviewImage
from sdcli.server.remote_fields import Allowed, remote_fields, upload_size
from sdcli.server.settings import ServerSettings

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

STATUS_OF: dict[str, int] = {
    "cancelled": 409,
    "flagged": 409,
    "bad_request": 409,
    "not_found": 409,
    "timeout": 504,
    "out_of_memory": 503,
    "worker_died": 503,
}
"""What asking for an image answers that there will not be, by the kind of failure; 500 for others."""


class JobBody(BaseModel):
    """A job: one request, or several under `requests`. Fields of a request are those of a line of a prompts file."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | dict[str, Any]
    """The same fields as in JSONL: prompt, negative_prompt, seed, steps, num_images ..."""
    format: ImageFormat = "png"
    previews: Annotated[float | None, Field(ge=0.1, le=3600)] = None
    """Seconds between latent previews; none if omitted."""
    partial_images: Annotated[int, Field(ge=0, le=8)] = 0
    """Whole images decoded along the way, each an event; for each image of the job."""
    timeout: Annotated[float | None, Field(gt=0, le=86_400)] = None
    """The longest time that the job may run, in seconds; the server's own limit holds, too."""
    cancel_on_disconnect: bool = False
    """Cancel the job when the last client that follows its events goes away."""


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
    custom_id: str | None = None
    """That of its request."""
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
    too_many = ApiError(400, "bad_request", f"a job has at most {settings.max_images} images here")
    if sum(map(_asked, requests)) > settings.max_images:
        raise too_many
    allowed = Allowed.of(registry, settings)
    try:
        safe = [remote_fields(fields, allowed=allowed) for fields in requests]
    except (UsageError, NotFound) as error:
        raise _bad_request(error) from None
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
            raise _bad_request(job.error)
        width, height = job.request.final_size
        if width * height > settings.max_pixels:
            raise ApiError(400, "bad_request", f"{width}x{height} is more than {settings.max_pixels} pixels")
        found.append(replace(job, index=len(found)))
    return tuple(found)


def _asked(fields: dict[str, Any]) -> int:
    """How many images a request asks for; 1 for a value that is no such number, about which `expand` has a sentence."""
    value = fields.get("num_images", fields.get("n"))
    try:
        return 1 if value is None else whole_count("num_images", value)
    except UsageError:
        return 1


def _bad_request(error: SdcliError) -> ApiError:
    if isinstance(error, NotFound):
        return ApiError(404, "not_found", str(error))
    return ApiError(400, "bad_request", str(error))


async def submit(
    engine: Engine, registry: Registry, request: Request, requests: list[dict[str, Any]], **wishes: Any
) -> Job:
    """Resolve requests and queue them as one job. Raises ApiError."""
    images = await asyncio.to_thread(resolve_images, requests, registry, engine.settings)
    job = Job(f"job-{secrets.token_hex(12)}", client_of(request), images, **wishes)
    with _refusals(engine):
        engine.submit(job)
    return job


def require_room(engine: Engine) -> None:
    """Raise ApiError where no further job is taken now."""
    with _refusals(engine):
        engine.check_room()


@contextlib.contextmanager
def _refusals(engine: Engine) -> Iterator[None]:
    """The engine's refusals of a job as ApiError."""
    try:
        yield
    except QueueFull:
        sentence = f"the queue is full ({engine.settings.max_queue} jobs)"
        raise ApiError(429, "queue_full", sentence, retry=engine.retry_after()) from None
    except Draining:
        raise ApiError(503, "stopping", "the server is stopping", retry=30) from None


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
        requests = [body.requests] if isinstance(body.requests, dict) else body.requests
        wishes = {
            "format": body.format,
            "preview_every": body.previews,
            "partial_images": body.partial_images,
            "timeout": body.timeout,
            "tied": body.cancel_on_disconnect,
        }
        job = await submit(engine, registry, request, requests, **wishes)
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

    @router.get("/v1/jobs/{id}/events", response_class=EventStream)
    async def events(id: str, last_event_id: Annotated[int | None, Header(ge=0)] = None) -> EventStream:
        return EventStream(_events(find(id), engine, 0 if last_event_id is None else last_event_id + 1))

    @router.get("/v1/jobs/{id}/images/{number}", response_class=Response)
    async def image(id: str, number: int) -> Response:
        job = find(id)
        if number in job.failed:
            failed = job.failed[number]
            raise ApiError(STATUS_OF.get(failed.kind, 500), failed.kind, failed.sentence)
        if number not in job.done:
            there = 0 <= number < len(job.images)
            raise ApiError(409 if there else 404, "not_ready" if there else "not_found", "this image is not there")
        return Response(
            job.done[number].data,
            media_type=MEDIA_TYPES[job.format],
            headers={"content-disposition": f'inline; filename="{job.id}-{number}{SUFFIX_OF[job.format]}"'},
        )

    @router.delete("/v1/jobs/{id}/images/{number}")
    async def cancel_image(id: str, number: int) -> JobView:
        job = find(id)
        if not 0 <= number < len(job.images):
            raise ApiError(404, "not_found", "this job has no such image")
        engine.cancel(job, frozenset({number}))
        return view(job, engine)

    @router.get("/v1/jobs/{id}/images/{number}/preview", response_class=Response)
    async def image_preview(id: str, number: int) -> Response:
        return _preview(find(id).previews.get(number))

    @router.get("/v1/jobs/{id}/partials/{number}", response_class=Response)
    async def partial(id: str, number: int) -> Response:
        job = find(id)
        if not 0 <= number < len(job.partials):
            raise ApiError(404, "not_found", "there is no such partial image")
        return Response(job.partials[number].data, media_type=MEDIA_TYPES[job.format])

    @router.get("/v1/jobs/{id}/preview", response_class=Response)
    async def preview(id: str) -> Response:
        return _preview(find(id).preview)

    return router


async def _events(job: Job, engine: Engine, first: int) -> AsyncGenerator[bytes, None]:
    """The events of a job from number `first` on. When its last follower goes away, a job that is tied is cancelled."""
    job.followers += 1
    try:
        async with contextlib.aclosing(paced(job.follow(first), SIGN_OF_LIFE)) as events:
            async for one in events:
                if one is None:
                    yield STILL_WORKING
                    continue
                number, event = one
                yield event_bytes(event["type"], _with_urls(job, event), id=number)
    finally:
        job.followers -= 1
        if job.tied and not job.followers:
            engine.cancel(job, why="the client went away")


def _preview(preview: PreviewImage | None) -> Response:
    if preview is None:
        raise ApiError(404, "not_found", "there is no preview")
    return Response(preview.data, media_type="image/png", headers={"cache-control": "no-store"})


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
    seed, custom_id = job.images[number].request.seed, job.images[number].custom_id
    if number in job.done:
        done = job.done[number]
        url = f"/v1/jobs/{job.id}/images/{number}"
        return ImageView(
            state="done", url=url, seed=seed, custom_id=custom_id, seconds=done.seconds, request=done.request
        )
    if number in job.failed:
        failed = job.failed[number]
        state: Literal["cancelled", "failed"] = "cancelled" if failed.kind == "cancelled" else "failed"
        return ImageView(state=state, seed=seed, custom_id=custom_id, kind=failed.kind, error=failed.sentence)
    return ImageView(state="waiting", seed=seed, custom_id=custom_id)


def _with_urls(job: Job, event: dict[str, Any]) -> dict[str, Any]:
    match event["type"]:
        case "image":
            return {**event, "url": f"/v1/jobs/{job.id}/images/{event['image']}"}
        case "preview":
            return {**event, "url": f"/v1/jobs/{job.id}/images/{event['image']}/preview"}
        case "partial":
            return {**event, "url": f"/v1/jobs/{job.id}/partials/{event['number']}"}
    return event


JobView.model_rebuild()
