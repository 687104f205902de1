"""Routes for clients that show a form, such as the page.

GET    /v1/capabilities             what can be generated here: models, schedulers, LoRAs, fields and limits
POST   /v1/metadata                 the settings stored in an uploaded image, by whichever tool
POST   /v1/command                  the line of `sdcli generate` for a request
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sdcli import __version__
from sdcli.errors import BadImage, SdcliError, UsageError
from sdcli.images.formats import ImageFormat
from sdcli.metadata.tool_record import Tool
from sdcli.models.adapter_files import user_lora_folder
from sdcli.models.presence import USABLE, presence
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.command_line import command_line
from sdcli.request.schedulers import SCHEDULERS, schedulers_for
from sdcli.request.schema import GenerationRequest, is_list, parse_request
from sdcli.server.native import ApiError
from sdcli.server.remote_fields import image_in
from sdcli.server.settings import ServerSettings
from sdcli.server.uploaded_settings import FILES, uploaded_settings


class FormDefaults(BaseModel):
    """The values of the fields that a request leaves to the model."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    prompt_template: str
    prompt_syntax: str
    eta: float = 0.0


class ModelView(BaseModel):
    """A model that requests may name."""

    name: str
    description: str
    family: str
    usable: bool
    """Whether its files are here; `sdcli models pull` downloads them."""
    defaults: FormDefaults
    size_step: int
    """Width and height are multiples of this."""
    smallest_size: int
    schedulers: list[str]
    """Those that go with it."""
    takes_prompt: bool
    classes: list[str]
    """What the prompt may be, if it names a class."""
    unguided: str
    """Why it takes no guidance and no negative prompt; empty if it does."""
    inpaints: bool
    """Whether it needs a mask."""


class FieldView(BaseModel):
    """A field of a request, for those who read forms."""

    description: str
    is_list: bool
    choices: list[str] | None = None


class FormLimits(BaseModel):
    """What the operator has set."""

    images: int
    """Images of one job."""
    pixels: int
    """Pixels of one image."""
    upload_pixels: int
    """Pixels of an image in a request."""
    body: int
    """Bytes of a request."""
    keep: float
    """Seconds for which finished images can be fetched."""


class Capabilities(BaseModel):
    """What can be generated here."""

    version: str
    default_model: str
    models: list[ModelView]
    schedulers: dict[str, str]
    """Name -> what it is."""
    loras: list[str]
    fields: dict[str, FieldView]
    limits: FormLimits


class MetadataBody(BaseModel):
    """An image whose settings are wanted."""

    model_config = ConfigDict(extra="forbid")

    image: str
    """PNG, JPEG or WebP as base64 text."""


class MetadataView(BaseModel):
    """What an image says about how it was made."""

    width: int
    height: int
    format: ImageFormat
    source: Literal["sdcli"] | Tool | None
    """The tool that wrote it."""
    request: dict[str, Any] | None
    """Fields that a request to this server can have; None if the image holds no settings."""
    not_taken: dict[str, Any]
    """The rest of what was read: settings without a counterpart, files, and models and LoRAs that are not here."""


class CommandBody(BaseModel):
    """A request; its images are named as they are called on the disk of the person who will run the command."""

    model_config = ConfigDict(extra="forbid")

    request: dict[str, Any]
    num_images: Annotated[int, Field(ge=1, le=100_000)] = 1


class CommandView(BaseModel):
    """A line for a POSIX shell."""

    command: str | None
    """None where a text is longer than an argument of a command can be."""


def form_routes(settings: ServerSettings, registry: Registry) -> APIRouter:
    """The routes; all of them read small files, so they run in threads."""
    router = APIRouter(tags=["forms"])

    def is_usable(name: str) -> bool:
        return name in registry.models and presence(registry.models[name]) in USABLE

    @router.get("/v1/capabilities")
    def capabilities() -> Capabilities:
        return Capabilities(
            version=__version__,
            default_model=registry.default,
            models=list(_models(registry)),
            schedulers={name: row.summary for name, row in SCHEDULERS.items()},
            loras=_loras(settings.run.lora_dir),
            fields=_fields(),
            limits=FormLimits(
                images=settings.max_images,
                pixels=settings.max_pixels,
                upload_pixels=settings.max_upload_pixels,
                body=settings.max_body,
                keep=settings.keep,
            ),
        )

    @router.post("/v1/metadata")
    def metadata(body: MetadataBody) -> MetadataView:
        try:
            data = image_in(body.image, field="image", max_pixels=settings.max_upload_pixels).data
            assert data is not None
            info, request, left = uploaded_settings(data, is_usable=is_usable, lora_dir=settings.run.lora_dir)
        except (UsageError, BadImage) as error:
            raise ApiError(400, "bad_request", str(error), param="image") from None
        return MetadataView(
            width=info.width,
            height=info.height,
            format=info.format,
            source=info.source,
            request=request,
            not_taken=left,
        )

    @router.post("/v1/command")
    def command(body: CommandBody) -> CommandView:
        try:
            for name in ("init_image", "mask"):
                if isinstance(body.request.get(name), dict):
                    raise UsageError(f"{name}: a command needs the name of a file")
            return CommandView(command=command_line(parse_request(body.request), num_images=body.num_images))
        except UsageError as error:
            raise ApiError(400, "bad_request", str(error)) from None

    return router


def _models(registry: Registry) -> Iterator[ModelView]:
    """The models that can be generated with; those whose small files are damaged are left out, as requests would fail.

    Those that are not here are shown, too, for people who wonder where they are.
    """
    for name, known in registry.models.items():
        try:
            spec = registry.find(name)
            usable = presence(spec) in USABLE
        except SdcliError:
            spec, usable = known, False
        if spec.family.supported:
            yield _model(name, spec, usable)


def _model(name: str, spec: ModelSpec, usable: bool) -> ModelView:
    kind, family = spec.kind, spec.family
    return ModelView(
        name=name,
        description=spec.description,
        family=family.name,
        usable=usable,
        defaults=FormDefaults(
            **spec.defaults.model_dump(exclude={"dtype"}), prompt_syntax="a1111" if family.reads_text else "plain"
        ),
        size_step=kind.size_step,
        smallest_size=kind.smallest_size,
        schedulers=schedulers_for(family.process),
        takes_prompt=family.takes_prompt,
        classes=list(kind.classes),
        unguided=kind.unguided,
        inpaints=kind.inpaints,
    )


def _loras(folder: Path | None) -> list[str]:
    """The names of the LoRA folder, as requests call them."""
    root = folder or user_lora_folder()
    try:
        found = sorted(path for path in root.iterdir() if path.is_dir() or path.suffix == ".safetensors")
    except OSError:
        return []
    return [path.name.removesuffix(".safetensors") for path in found]


def _fields() -> dict[str, FieldView]:
    """The fields of a request that can be given over the network."""
    schema = GenerationRequest.model_json_schema()["properties"]
    return {
        name: FieldView(description=info.description or "", is_list=is_list(name), choices=_choices(schema[name]))
        for name, info in GenerationRequest.model_fields.items()
        if name != "schema_version" and name not in (set(FILES) - {"init_image", "mask"})
    }


def _choices(schema: dict[str, Any]) -> list[str] | None:
    """The values of a field that has few: those of an enumeration, or of a boolean."""
    for one in (schema, *schema.get("anyOf", ())):
        if "enum" in one:
            return list(one["enum"])
        if one.get("type") == "boolean":
            return ["true", "false"]
    return None
