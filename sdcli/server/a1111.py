"""The API of AUTOMATIC1111's web UI, for the clients that speak it: SillyTavern, Open WebUI, webuiapi and others.

POST /sdapi/v1/txt2img, img2img            images, and their settings as a JSON text
GET  /sdapi/v1/progress                    how far the caller's job is, or the one of `id_task`
POST /sdapi/v1/interrupt, skip             cancel the caller's running job, or the images that it works on now
GET, POST /sdapi/v1/options                the model and other settings of calls that do not bring their own
POST /sdapi/v1/png-info                    what an image says about how it was made

The lists of samplers, models and so on are in `a1111_lists.py`.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from sdcli.errors import SdcliError
from sdcli.models.registry import Registry
from sdcli.server.a1111_fields import request_fields
from sdcli.server.a1111_images import image_fields
from sdcli.server.a1111_info import info_text, png_info
from sdcli.server.a1111_lists import list_routes
from sdcli.server.a1111_models import (
    A1111Error,
    Images,
    Img2Img,
    Nothing,
    PendingTasks,
    PngInfo,
    PngInfoQuestion,
    ProgressAnswer,
    TaskProgress,
    TaskQuestion,
    Txt2Img,
)
from sdcli.server.a1111_options import first_options
from sdcli.server.a1111_tasks import ImageTask, Tasks
from sdcli.server.blocking import ClientGone, failure_of, wait_for
from sdcli.server.dialects import AsciiAnswer
from sdcli.server.engine import Engine
from sdcli.server.native import ApiError, client_of, require_room, submit
from sdcli.server.remote_fields import image_in

PREVIEW_EVERY = 2.0
"""Seconds between the previews that `progress` shows."""
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111Error, "description": text}
    for status, text in {
        400: "refused",
        401: "no token",
        404: "no such sampler, model or image",
        409: "interrupted",
        413: "too large",
        422: "a field of another type",
        429: "the queue is full",
        500: "failed",
        503: "out of memory, or the server is stopping",
    }.items()
}
TaskId = Annotated[str | None, Query(max_length=200, description="a task id, as force_task_id gave it")]


def routes(engine: Engine, registry: Registry) -> APIRouter:
    """The routes of the dialect."""
    router = APIRouter(tags=["AUTOMATIC1111"], responses=_FAILURES)
    settings, tasks = engine.settings, Tasks(engine)
    options = first_options(registry)
    preparing = asyncio.Lock()  # images are decoded and filled in this process, each in a good part of a gigabyte

    @router.post("/sdapi/v1/txt2img", response_model=Images)
    async def txt2img(body: Txt2Img, request: Request) -> AsciiAnswer:
        return await generate(body, request)

    @router.post("/sdapi/v1/img2img", response_model=Images)
    async def img2img(body: Img2Img, request: Request) -> AsciiAnswer:
        return await generate(body, request)

    async def images_of(body: Img2Img, request: Request) -> dict[str, Any]:
        require_room(engine)
        async with preparing:
            if await request.is_disconnected():
                raise ClientGone
            require_room(engine)
            return await asyncio.to_thread(image_fields, body, settings)

    async def generate(body: Txt2Img, request: Request) -> AsciiAnswer:
        nonlocal options
        overridden = body.override_settings or {}
        own = options.changed(overridden, registry, settings, where="override_settings.")
        fields = request_fields(body, own, registry, settings)
        if isinstance(body, Img2Img):
            fields |= await images_of(body, request)
        wishes = {"format": own.samples_format, "preview_every": PREVIEW_EVERY}
        job = await submit(engine, registry, request, [fields], **wishes)
        if body.override_settings_restore_afterwards is False:
            options = options.changed(overridden, registry, settings)
        kind = "img2img" if isinstance(body, Img2Img) else "txt2img"
        id = body.force_task_id or f"task({kind}-{secrets.token_hex(8)})"
        task = ImageTask(id, kind, job, body.batch_size or 1)
        tasks.add(task)
        await wait_for(job, engine, request)
        for failed in job.failed.values():
            wanted = failed.kind == "cancelled" and (task.interrupted or task.skipped)
            if not wanted or not job.done:
                raise failure_of(job, engine, failed)
        info = info_text(body, task)
        shown = [] if body.send_images is False else [job.done[number].data for number in sorted(job.done)]
        encoded = [base64.b64encode(data).decode() for data in shown]
        return AsciiAnswer(Images(images=encoded, parameters=_echo(body), info=info).model_dump())

    @router.get("/sdapi/v1/progress")
    async def progress(request: Request, skip_current_image: bool = False, id_task: TaskId = None) -> ProgressAnswer:
        return tasks.progress(client_of(request), id_task, with_image=not skip_current_image)

    @router.post("/internal/progress")
    async def task_progress(question: TaskQuestion, request: Request) -> TaskProgress:
        return tasks.task_progress(client_of(request), question)

    @router.get("/internal/pending-tasks")
    async def pending_tasks(request: Request) -> AsciiAnswer:
        ids = [task.id for task in tasks.waiting(client_of(request))]
        return AsciiAnswer(PendingTasks(size=len(ids), tasks=ids).model_dump())

    @router.post("/sdapi/v1/interrupt")
    async def interrupt(request: Request, id_task: TaskId = None) -> Nothing:
        tasks.interrupt(client_of(request), id_task)
        return Nothing()

    @router.post("/sdapi/v1/skip")
    async def skip(request: Request, id_task: TaskId = None) -> Nothing:
        tasks.skip(client_of(request), id_task)
        return Nothing()

    @router.get("/sdapi/v1/options")
    async def show_options() -> dict[str, Any]:
        return options.shown

    @router.post("/sdapi/v1/options")
    async def set_options(body: dict[str, Any]) -> Nothing:
        nonlocal options
        options = options.changed(body, registry, settings)
        return Nothing()

    @router.post("/sdapi/v1/png-info", response_model=PngInfo)
    async def read_png_info(body: PngInfoQuestion) -> AsciiAnswer:
        try:
            upload = image_in(body.image, field="image", max_pixels=settings.max_upload_pixels)
            found = await asyncio.to_thread(png_info, upload.data or b"")
        except SdcliError as error:
            raise ApiError(400, "bad_request", str(error), param="image") from None
        return AsciiAnswer(found.model_dump())

    list_routes(router, registry, settings)
    return router


def _echo(body: Txt2Img) -> dict[str, Any]:
    """The fields as they came, without what is large or secret."""
    images = isinstance(body, Img2Img) and body.include_init_images
    hidden = {"init_images": None, "mask": None} if isinstance(body, Img2Img) and not images else {}
    return {**body.model_dump(exclude={"url", "auth"}), **hidden}
