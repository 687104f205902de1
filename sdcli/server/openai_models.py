"""Bodies and answers of OpenAI's images API, as pydantic models.

A field that cannot be honoured is refused by its name, unless it has the value that clients send by default. The
fields that OpenAI does not have are named as by vLLM-Omni: num_inference_steps, guidance_scale, negative_prompt, seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sdcli.images.formats import ImageFormat
from sdcli.request.fields import check_number
from sdcli.request.schema import MAX_SEED


def _only(*accepted: str, why: str) -> BeforeValidator:
    """Refuses every value but those that change nothing, with a sentence."""

    def check(value: Any) -> Any:
        if value is not None and value not in accepted:
            raise ValueError(f"{str(value)[:40]!r} is not supported ({', '.join(accepted)} is): {why}")
        return value

    return BeforeValidator(check)


Background = Annotated[
    Literal["auto", "opaque"] | None, _only("auto", "opaque", why="the images have no transparent parts")
]
Moderation = Annotated[
    Literal["auto"] | None, _only("auto", why="the model's own safety checker decides, where it has one")
]
Quality = Annotated[
    Literal["auto", "standard"] | None,
    _only("auto", "standard", why="there are no levels of quality; num_inference_steps sets the denoising steps"),
]
Style = Annotated[Literal["vivid"] | None, _only("vivid", why="write the style into the prompt")]
InputFidelity = Annotated[
    Literal["low"] | None, _only("low", why="strength says how much of the image may change, from 0 to 1")
]


class ImageBody(BaseModel):
    """What generations and edits have in common. null is the same as a field that is omitted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(max_length=32_000, description="what to generate; read as by `sdcli generate`")
    model: str | None = Field(None, description="a name of GET /v1/models; default: the server's first")
    n: int | None = Field(None, ge=1, le=10, description="images, with seeds that count up; default: 1")
    size: str | None = Field(None, description="WIDTHxHEIGHT or auto, which is the model's own size, or the image's")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: an address on this server, valid for as long as it keeps images; default: b64_json"
    )
    output_format: ImageFormat | None = Field(None, description="default: png")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp; default: 95; png is lossless"
    )
    stream: bool | None = Field(None, description="answer with server-sent events; needs n = 1")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="with stream: images decoded from the running denoising"
    )
    negative_prompt: str | None = Field(None, description="what to avoid; needs a guidance scale above 1")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; default: the model's")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="default: the model's")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="random if omitted; the answer has it")
    scheduler: str | None = Field(None, description="a name of `sdcli generate --scheduler help`")
    prompt_syntax: Literal["a1111", "plain"] | None = Field(
        None, description="whether (parentheses) and [brackets] are syntax; default: a1111, they are"
    )
    background: Background = None
    moderation: Moderation = None
    quality: Quality = None
    style: Style = None
    user: str | None = Field(None, description="accepted, and not used")
    safety_identifier: str | None = Field(None, description="accepted, and not used")

    _check_number: Callable[..., Any] = field_validator("*", mode="before")(check_number)

    @model_validator(mode="after")
    def _goes_together(self) -> ImageBody:
        if self.stream and (self.n or 1) > 1:
            raise ValueError("stream: needs n = 1, because its events do not say which image they are of")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: has no effect without stream")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream holds the images themselves; use b64_json")
        if self.output_compression not in (None, 100) and (self.output_format or "png") == "png":
            raise ValueError("output_compression: has no effect on png; use it with jpeg or webp")
        return self

    def fields(self) -> dict[str, Any]:
        """The fields of sdcli's request."""
        named = {
            "prompt": self.prompt,
            "num_images": self.n or 1,
            "negative_prompt": self.negative_prompt or None,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": self.scheduler,
            "prompt_syntax": self.prompt_syntax,
            "size": None if self.size in (None, "auto") else self.size,
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def format(self) -> ImageFormat:
        return self.output_format or "png"

    @property
    def encoder_quality(self) -> int | None:
        """For the encoder of jpeg and webp; None is the usual one."""
        return None if self.format == "png" else self.output_compression


class EditForm(ImageBody):
    """The form of an edit. The image comes as `image`, or as `image[]` as the client libraries send lists."""

    image: list[UploadFile] = Field([], description="PNG, JPEG or WebP; exactly one, here or in image[]")
    image_list: list[UploadFile] = Field([], alias="image[]")
    mask: UploadFile | None = Field(
        None, description="PNG or WebP of the image's size; its transparent part is generated anew, the rest kept"
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="how much of the image may change; default: 0.8, with a mask 1"
    )
    input_fidelity: InputFidelity = None

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), **({"strength": self.strength} if self.strength is not None else {})}


class AnswerImage(BaseModel):
    """One image."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="the seed that gives this image again (not of OpenAI)")


class TokenDetails(BaseModel):
    """Always zeros."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Zeros: nothing is counted here, but clients expect the numbers."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class ImagesAnswer(BaseModel):
    """The images of a call that does not stream."""

    created: int
    data: list[AnswerImage]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    usage: Usage = Usage()


class ModelAnswer(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sdcli"


class ModelList(BaseModel):
    """The models that are on this machine."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class OpenAIProblem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """The body of every failure."""

    error: OpenAIProblem
