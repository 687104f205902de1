"""Fields of a request that have several parts and one spelling: files, LoRAs, ControlNets, intervals of the steps."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

MAX_LORA_WEIGHT = 100.0
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_LORA = re.compile(rf"(?P<path>.+?)(?::(?P<unet_weight>{_NUMBER}))?(?::(?P<text_weight>{_NUMBER}))?", re.DOTALL)


def check_number(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A value for a field of numbers or booleans, refused where pydantic would turn one kind into another.

    `true` is no number, 2.0 is no whole number, and 1 is no boolean; all of them may be spelled as text. A validator of
    every field, to run before pydantic's own. Raises ValueError.
    """
    if not isinstance(value, bool | int | float):
        return value
    annotation = cls.model_fields[str(info.field_name)].annotation
    kinds = {bool, int, float} & {annotation, *get_args(annotation)}
    if not kinds:
        return value
    if bool in kinds and not isinstance(value, bool):
        raise ValueError(f"should be true or false, not {value}")
    if bool not in kinds and isinstance(value, bool):
        raise ValueError(f"should be a number, not {str(value).lower()}")
    if kinds == {int} and isinstance(value, float):
        raise ValueError(f"should be a whole number, not {value}")
    return value


class FieldModel(BaseModel):
    """A value of several parts with one spelling, which flags and data accept and `str` returns."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)

    _check_number = field_validator("*", mode="before")(check_number)

    @model_validator(mode="before")
    @classmethod
    def _from_spelling(cls, value: Any) -> Any:
        return cls.pieces(value) if isinstance(value, str) else value

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        """The fields that a spelling means. Raises ValueError with what it should be."""
        raise NotImplementedError


class FileRef(FieldModel):
    """A file to read, with its digest, so that another file under the same name is refused later."""

    path: str = Field(min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Of its bytes; filled when the request is resolved."""

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        return {"path": text}

    def __str__(self) -> str:
        return self.path


class ImageBytes(BaseModel):
    """An image held in memory, such as an upload: identified by its digest, and never by the name of a file."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    data: bytes | None = Field(None, strict=True, exclude=True, repr=False)
    """Its bytes; None in a request that was read from JSON, which holds the digest alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_bytes(cls, value: Any) -> Any:
        return {"data": value, "sha256": hashlib.sha256(value).hexdigest()} if isinstance(value, bytes) else value

    @model_validator(mode="after")
    def _digest_fits(self) -> Self:
        if self.data is not None and hashlib.sha256(self.data).hexdigest() != self.sha256:
            raise ValueError("sha256 is not the digest of the data")
        return self

    def __str__(self) -> str:
        return f"image {self.sha256[:12]}"


ImageInput = FileRef | ImageBytes
"""An image that a request names, or holds."""


class EmbeddingRef(FileRef):
    """A textual inversion embedding, and the word in prompts that is replaced by its vectors."""

    token: str | None = None

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        path, separator, token = text.rpartition("=")
        named = bool(separator) and not text.lower().endswith(".safetensors")
        return {"path": path, "token": token} if named else {"path": text}

    @property
    def word(self) -> str:
        """The token, or else the file's name without its suffix."""
        return self.token if self.token is not None else Path(self.path).stem

    def __str__(self) -> str:
        return self.path if self.token is None else f"{self.path}={self.token}"


class Extend(FieldModel):
    """Pixels to add on each side of an init image."""

    left: int = Field(0, ge=0, le=8192)
    top: int = Field(0, ge=0, le=8192)
    right: int = Field(0, ge=0, le=8192)
    bottom: int = Field(0, ge=0, le=8192)

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        pairs = re.findall(r"(left|top|right|bottom)=(\d{1,4})(?:,|$)", text)
        if not pairs or ",".join(f"{side}={pixels}" for side, pixels in pairs) != text or len(dict(pairs)) < len(pairs):
            raise ValueError(f"is written as left=64,top=32, not {text!r}")
        return dict(pairs)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(pixels for _, pixels in self):
            raise ValueError("adds nothing on any side")
        return self

    def __str__(self) -> str:
        return ",".join(f"{side}={pixels}" for side, pixels in self if pixels)


class Upscale(FieldModel):
    """A second pass over the finished image, enlarged."""

    factor: float = Field(gt=1, le=8)
    strength: float = Field(0.5, gt=0, le=1)
    how: Literal["pixel", "latent"] = "pixel"

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        match = re.fullmatch(r"([\d.]+)x?(?::([\d.]+))?(?::(pixel|latent))?", text)
        if not match:
            raise ValueError(f"is written as 2x, 2x:0.5 or 2x:0.5:latent, not {text!r}")
        named = zip(("factor", "strength", "how"), match.groups(), strict=True)
        return {name: value for name, value in named if value is not None}

    def __str__(self) -> str:
        return f"{digits(self.factor)}x:{digits(self.strength)}:{self.how}"


class Interval(FieldModel):
    """A part of the denoising, as fractions of its steps: 0 is the beginning, 1 the end."""

    start: float = Field(0, ge=0, le=1)
    stop: float = Field(1, ge=0, le=1)

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        match = re.fullmatch(r"([\d.]*)-([\d.]*)", text)
        if not match or not any(match.groups()):
            raise ValueError(f"is written as 0.2-0.8, not {text!r}")
        return {name: value for name, value in zip(("start", "stop"), match.groups(), strict=True) if value}

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.start >= self.stop:
            raise ValueError("should end after it starts")
        return self

    def indices(self, count: int) -> range:
        """Which of `count` steps lie in it, from 0."""
        return range(int(self.start * count), int(self.stop * count))

    def __str__(self) -> str:
        return f"{digits(self.start)}-{digits(self.stop)}"


class LoraRef(FieldModel):
    """One LoRA of a request, `FILE[:unet_weight[:text_weight]]`, with the digest of the file.

    Weights are multiples of the strength it was trained with: 1 is that, 0 changes nothing, negative ones take away.
    """

    path: str = Field(min_length=1, max_length=4096)
    """A .safetensors file, a PEFT folder, or a name that is looked up in the LoRA folder."""
    unet_weight: float = Field(1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)
    text_weight: float = Field(1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)
    """For the text encoders; the UNet's if omitted."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Filled when the request is resolved."""

    @model_validator(mode="before")
    @classmethod
    def _one_weight_for_both(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: piece for name, piece in value.items() if piece is not None}
        return {"text_weight": given["unet_weight"], **given} if "unet_weight" in given else given

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        match = _LORA.fullmatch(text)
        path, weight, text_weight = match.groups() if match else ("", None, None)
        return {"path": path, "unet_weight": weight or 1.0, "text_weight": text_weight or weight or 1.0}

    @field_validator("path")
    @classmethod
    def _plain_unicode(cls, value: str) -> str:
        return plain_unicode(value)

    def __str__(self) -> str:
        short = f"{self.path}:{digits(self.unet_weight)}"
        if self.unet_weight == self.text_weight and _LORA.fullmatch(short)["path"] == self.path:  # type: ignore[index]
            return short
        return f"{short}:{digits(self.text_weight)}"


MapMaker = Literal["canny", "scribble", "softedge", "blur", "tile", "palette", "depth"]
"""How the map of an image is computed; `images.preprocessors` implements them."""
Preprocessor = Literal["none", MapMaker]
"""The same, or `none` for an image that is a map already."""
_PREPROCESSORS = "|".join(get_args(Preprocessor))
_CONTROL = re.compile(
    rf"(?:(?P<preprocessor>{_PREPROCESSORS}):)?(?P<model>[^=]+)=(?P<image>.+?)"
    rf"(?::(?P<weight>{_NUMBER}))?(?:@(?P<start>[\d.]*)-(?P<end>[\d.]*))?",
    re.DOTALL,
)


class Control(FieldModel):
    """One ControlNet of a request and its image, `[PREPROCESSOR:]MODEL=IMAGE[:WEIGHT][@START-END]`."""

    model: str = Field(min_length=1, max_length=4096, pattern="^[^=]+$")
    """A name from models.yaml, a folder or a .safetensors file; one with = in its name has no spelling."""
    image: ImageInput
    preprocessor: Preprocessor = "none"
    weight: float = Field(1.0, ge=0, le=10)
    """Factor of its residuals; 1 as it was trained."""
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)
    """The steps in which it is applied, as fractions of their number."""

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        match = _CONTROL.fullmatch(text)
        if not match:
            raise ValueError(f"is written as MODEL=IMAGE, canny:MODEL=IMAGE or MODEL=IMAGE:0.8@0-0.5, not {text!r}")
        return {name: value for name, value in match.groupdict().items() if value}

    @field_validator("model")
    @classmethod
    def _plain_unicode(cls, value: str) -> str:
        return plain_unicode(value)

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.weight == 0:
            raise ValueError(f"{self.model} has no effect at weight 0")
        if self.start >= self.end:
            raise ValueError(f"{self.model} should end after it starts, not {self.start:g}-{self.end:g}")
        return self

    def is_active(self, index: int, count: int) -> bool:
        """Whether it is applied in step `index` of `count`, from 0; diffusers' rule."""
        return index / count >= self.start and (index + 1) / count <= self.end

    def __str__(self) -> str:
        named = self.preprocessor != "none" or re.match(rf"(?:{_PREPROCESSORS}):", self.model)
        part = f"@{digits(self.start)}-{digits(self.end)}" if (self.start, self.end) != (0, 1) else ""
        return f"{f'{self.preprocessor}:' if named else ''}{self.model}={self.image}:{digits(self.weight)}{part}"


_IMAGE_PROMPT = re.compile(rf"(?P<adapter>[^=]+)=(?P<image>.+?)(?::(?P<weight>{_NUMBER}))?", re.DOTALL)


class ImagePrompt(FieldModel):
    """One IP-Adapter of a request and the image that it prompts with, `ADAPTER=IMAGE[:WEIGHT]`."""

    adapter: FileRef
    """A .safetensors file; one with = in its name has no spelling."""
    image: ImageInput
    weight: float = Field(1.0, ge=0, le=10)
    """Factor of its attention; 1 as it was trained."""

    @classmethod
    def pieces(cls, text: str) -> dict[str, Any]:
        match = _IMAGE_PROMPT.fullmatch(text)
        if not match:
            raise ValueError(f"is written as ADAPTER=IMAGE or ADAPTER=IMAGE:0.6, not {text!r}")
        return {name: value for name, value in match.groupdict().items() if value}

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if "=" in self.adapter.path:
            raise ValueError(f"{self.adapter} has a = in its name; give it another")
        if self.weight == 0:
            raise ValueError(f"{self.adapter} has no effect at weight 0")
        return self

    @property
    def adapting(self) -> tuple[FileRef, float]:
        """The adapter and its weight: what has to be equal for all images of a batch."""
        return self.adapter, self.weight

    def __str__(self) -> str:
        return f"{self.adapter}={self.image}:{digits(self.weight)}"


def with_prompt(template: str) -> str:
    """A template that the prompt has a place in. Raises ValueError."""
    if "{prompt}" not in template:
        raise ValueError("has no {prompt} in it")
    return template


def plain_unicode(value: str) -> str:
    """A text that can be written as UTF-8, without NUL, of at most a million characters. Raises ValueError."""
    if "\0" in value:
        raise ValueError("has a NUL character")
    if len(value) > 1_000_000:
        raise ValueError(f"has {len(value):,} characters, more than a million")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half a character (not valid UTF-8 text)") from None
    return value


def digits(number: float) -> str:
    """The shortest text that is read as this number: 1, not 1.0."""
    return repr(number).removesuffix(".0")
