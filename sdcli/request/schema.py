"""The request: one flat description of an image, the same in flags, JSON, CSV and the metadata of images."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from sdcli.errors import UsageError, in_own_words
from sdcli.request.fields import (
    Control,
    EmbeddingRef,
    Extend,
    FileRef,
    ImageBytes,
    ImageInput,
    ImagePrompt,
    Interval,
    LoraRef,
    Upscale,
    check_number,
    plain_unicode,
    with_prompt,
)
from sdcli.request.prompt_syntax import Prompts, parse_prompts, wrapped
from sdcli.request.schedulers import SCHEDULERS

SCHEMA = 2
"""In schema 1 all prompts were plain text."""
MAX_SEED = 2**63 - 1

ALIASES = {
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "num_inference_steps": "steps",
    "sampler": "scheduler",
    "negative": "negative_prompt",
    "text": "prompt",
    "lora": "loras",
    "control": "controls",
    "embedding": "embeddings",
    "ip_adapter": "ip_adapters",
}
"""Other tools' names of fields; accepted wherever a request is read as data."""


MAX_WATERMARK_BYTES = 32


class GenerationRequest(BaseModel):
    """One image as requested: a field that is None is left to the model.

    A field is here if and only if changing it is meant to change the image. An image's metadata holds the request with
    the values that it was generated with, a `ResolvedRequest`.
    """

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema", description="version of this layout")
    prompt: str = Field("", description="what to generate")
    negative_prompt: str | None = Field(
        None, description="what to avoid; needs a guidance scale above 1; default: nothing"
    )
    prompt_template: str | None = Field(
        None, description="text around the prompt, such as '{prompt}, glossy style'; default: the model's"
    )
    prompt_syntax: Literal["a1111", "plain"] | None = Field(
        None,
        description="how prompts are parsed; a1111: (word:1.3), [a:b:0.5], [a|b], AND, BREAK, any length; "
        "plain: text, cut to the text encoder's length; default: a1111",
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=100,
        description="hidden layer of the text encoder to use, counted from the end as in A1111: 1 is the last, 2 the "
        "one before, which diffusers calls 1; default: 2 for SDXL and Stable Diffusion 3, otherwise 1",
    )
    embeddings: tuple[EmbeddingRef, ...] = Field(
        (),
        description="textual inversion embedding and its word in the prompt (default: the file's name); "
        "may be repeated",
    )
    model: str | None = Field(
        None,
        description="name from models.yaml, diffusers folder, .safetensors file, or owner/name on the Hugging Face "
        "hub; default: that of models.yaml",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="seed of all random numbers of the image; random if omitted"
    )
    width: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="width in pixels, for most models a multiple of 8; default: the init image's or the model's",
    )
    height: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="height in pixels, for most models a multiple of 8; default: the init image's or the model's",
    )
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; default: the model's")
    fast: bool | None = Field(
        None,
        description="use the model's few-step preset: scheduler, steps and guidance scale, unless they are given, and "
        "its LoRA (`models show` prints it)",
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="how strongly to follow the prompt; 1 is off, 7..3 goes from 7 to 3; default: the model's",
    )
    scheduler: str | None = Field(
        None, description="denoising algorithm; `--scheduler help` lists them; default: the model's"
    )
    eta: float | None = Field(
        None, ge=0, le=1, description="noise that ddim adds in each step: 0 is none, 1 as much as ddpm; default: 0"
    )
    guidance_end: float | None = Field(
        None,
        ge=0,
        le=100,
        description="guidance scale of the last step, reached linearly; default: the same in all steps",
    )
    guidance_rescale: float | None = Field(
        None, ge=0, le=1, description="how far to take back the contrast that guidance adds; default: 0, off"
    )
    guidance_interval: Interval | None = Field(
        None,
        description="part of the steps with guidance, such as 0.2-0.8; the other steps take half the time; "
        "default: all",
    )
    reuse: int | None = Field(
        None,
        ge=1,
        le=20,
        description="run the whole UNet every so many steps only, and its outermost layers in the others, which is "
        "quicker and less exact; default: 1, every step",
    )
    pag_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="scale of perturbed-attention guidance, which avoids what the network generates without "
        "self-attention; default: 0, off",
    )
    variation_seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="seed of a second noise to mix in; random if omitted"
    )
    variation_strength: float | None = Field(None, ge=0, le=1, description="share of the second noise; default: 0")
    init_image: ImageInput | None = Field(
        None, description="image or latent file to start from; - reads an image from stdin"
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how much noise the init image gets: at 1 nothing is left of it; default: 0.8, with a mask 1",
    )
    mask: ImageInput | None = Field(
        None,
        description="image that is white where to generate and black where to keep the init image; also white strokes "
        "on transparent, or the init image with a part erased",
    )
    mask_blur: float | None = Field(
        None, ge=0, le=256, description="pixels over which the generated part fades into the kept one; default: 4"
    )
    invert_mask: bool | None = Field(None, description="generate where the mask is black, keep where it is white")
    extend: Extend | None = Field(
        None, description="pixels to add at the sides of the init image, such as left=64,top=32"
    )
    upscale: Upscale | None = Field(
        None,
        description="enlarge the image and denoise it again: 2x, 2x:0.5 (the strength, default 0.5) or 2x:0.5:latent",
    )

    controls: tuple[Control, ...] = Field(
        (),
        description="ControlNet and its image: canny:MODEL=photo.jpg computes the map of a photo, MODEL=edges.png "
        "is a map; weight default: 1; may be repeated",
    )
    guess_mode: bool | None = Field(
        None, description="apply ControlNets to the prompt's half of guidance only, which works without a prompt, too"
    )
    ip_adapters: tuple[ImagePrompt, ...] = Field(
        (),
        description="IP-Adapter and the image to prompt with: adapter.safetensors=photo.jpg:0.6 (the weight, "
        "default 1); may be repeated",
    )
    refiner: str | None = Field(None, description="SDXL model that denoises the last steps; named like a model")
    refiner_start: float | None = Field(
        None, gt=0, lt=1, description="share of the noise schedule that is done before the refiner; default: 0.8"
    )

    watermark: str | None = Field(
        None, min_length=1, description="text of at most 32 bytes to hide in the colours of the image"
    )
    loras: tuple[LoraRef, ...] = Field(
        (),
        description="LoRA, its weight (default 1) and its weight for the text encoder (default: the same); "
        "may be repeated",
    )

    _check_number = field_validator("*", mode="before")(check_number)

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"schema {value} is newer than this sdcli, which knows {SCHEMA}")
        return value

    @field_validator("prompt", "negative_prompt", "prompt_template", "model", "refiner")
    @classmethod
    def _plain_unicode(cls, value: str | None) -> str | None:
        return None if value is None else plain_unicode(value)

    @field_validator("loras", "embeddings", "controls", "ip_adapters", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("watermark")
    @classmethod
    def _short(cls, value: str | None) -> str | None:
        if value is not None and (len(value.encode()) > MAX_WATERMARK_BYTES or not value.isprintable()):
            raise ValueError(f"should be a line of at most {MAX_WATERMARK_BYTES} bytes")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _template_has_prompt(cls, value: str | None) -> str | None:
        return None if value is None else with_prompt(value)

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, value: str | None) -> str | None:
        if value is not None and value not in SCHEDULERS:
            raise ValueError(f"no scheduler {value!r}{did_you_mean(value, SCHEDULERS)} (--scheduler help lists them)")
        return value

    @property
    def full_prompt(self) -> str:
        """The text that the text encoder sees: the prompt inside its template, or each of those that AND joins."""
        template = self.prompt_template or "{prompt}"
        if self.prompt_syntax == "plain":
            return template.replace("{prompt}", self.prompt)
        return wrapped(self.prompt, template)

    @property
    def masked(self) -> bool:
        """Whether a part of the init image stays as it is."""
        return self.mask is not None or self.extend is not None

    def typed(self) -> dict[str, Any]:
        """The fields that were given, without those left to the model; JSON-ready."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {name: value for name, value in fields.items() if value != []}

    def key(self) -> str:
        """64 hex digits that are equal for equal requests, whatever they were read from."""
        canonical = json.dumps(self.typed(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def changed(self, **fields: Any) -> GenerationRequest:
        """The same request with some fields changed, checked again. Raises UsageError."""
        own = {info.alias or name: getattr(self, name) for name, info in type(self).model_fields.items()}
        return parse_request({**{name: value for name, value in own.items() if value != ()}, **fields})


PARSED_FROM = {"prompt", "negative_prompt", "prompt_template", "prompt_syntax", "steps", "strength", "upscale"}
"""The fields that decide what the text encoder reads at each step."""


class ResolvedRequest(GenerationRequest):
    """A request as it will be generated, with a value for everything that each image needs, and its prompts parsed.

    A field that is None belongs to a feature that the request does not use. `generation.resolve` makes these.
    """

    negative_prompt: str
    prompt_template: str
    prompt_syntax: Literal["a1111", "plain"]
    model: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    eta: float
    _prompts: dict[int, Prompts] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Parse the prompts once. Raises UsageError for what their syntax cannot mean."""
        parsed = partial(parse_prompts, self.full_prompt, self.negative_prompt, syntax=self.prompt_syntax)
        self._prompts = {steps: parsed(steps=steps) for steps in self.passes}

    def with_checked(self, fields: Mapping[str, Any]) -> Self:
        """A copy with the fields of a request that was resolved before; its prompts are parsed when they are used."""
        copied = super().model_copy(update=fields)
        if not PARSED_FROM.isdisjoint(fields):
            copied._prompts = {}
        return copied

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, not checked again; its prompts are parsed again where they changed."""
        copied = super().model_copy(update=update, deep=deep)
        if not PARSED_FROM.isdisjoint(update or ()):
            copied.model_post_init(None)
        return copied

    @property
    def prompts(self) -> Mapping[int, Prompts]:
        """The parsed prompts of each pass, by its number of steps."""
        if not self._prompts:
            self.model_post_init(None)
        return self._prompts

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; at a scale of 1 or less there is no unconditional half."""
        return max(self.guidance_scale, self.guidance_end or 0) > 1

    @property
    def passes(self) -> tuple[int, ...]:
        """The denoising steps of its one pass, or of its two where the image is upscaled."""
        strengths = (self.strength or 1, *([self.upscale.strength] if self.upscale is not None else []))
        return tuple(int(self.steps * strength) for strength in strengths)

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the finished image; those of an upscaled one are multiples of 8."""
        return final_size(self.width, self.height, self.upscale)


def final_size(width: int, height: int, upscale: Upscale | None) -> tuple[int, int]:
    """Width and height of the finished image of a request of that size; upscaled ones are multiples of 8."""
    if upscale is None:
        return width, height
    return round(width * upscale.factor / 8) * 8, round(height * upscale.factor / 8) * 8


def field_name(name: str) -> str:
    """Our name of a field that may be called as other tools do, or written with dashes."""
    plain = name.replace("-", "_")
    return ALIASES.get(plain, plain)


def is_list(field: str) -> bool:
    """Whether a field of the request holds several entries; its singular is an alias, for one of them."""
    info = GenerationRequest.model_fields.get(field)
    return info is not None and get_origin(info.annotation) is tuple


def canonical(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-like fields under our own names; the values stay as they are.

    `size: "WxH"` becomes width and height, and `guidance_scale: "7..3"`, which falls from 7 to 3, a guidance end, too.
    Raises UsageError for a field that a request does not have, or that has two values.
    """
    known = {info.alias or name for name, info in GenerationRequest.model_fields.items()}
    found: dict[str, Any] = {}
    for name, value in fields.items():
        field = field_name(name)
        named = {field: value}
        if field == "size":
            named = {} if value is None else dict(zip(("width", "height"), parse_size(str(value)), strict=True))
        elif field == "guidance_scale" and isinstance(value, str) and ".." in value:
            first, _, last = value.partition("..")
            if last.startswith("."):
                raise UsageError(f"guidance_scale: {value!r} is neither a number nor two of them, such as 7..3")
            named = {field: first, "guidance_end": last}
        elif field not in known:
            raise UsageError(f"a request has no field {name!r}{did_you_mean(field, known)}")
        for one in named:
            if one in found:
                raise UsageError(f"{one} is given twice")
        found |= named
    return found


NEEDS = {
    "strength": ("init_image",),
    "mask": ("init_image",),
    "extend": ("init_image",),
    "mask_blur": ("mask", "extend"),
    "invert_mask": ("mask",),
    "variation_seed": ("variation_strength",),
    "guess_mode": ("controls",),
    "refiner_start": ("refiner",),
}
"""A field has an effect only beside one of these."""


def check_needs(request: GenerationRequest) -> None:
    """Raise UsageError for a field that has no effect, because what it needs is not there."""
    for name, others in NEEDS.items():
        value = getattr(request, name)
        if value is None or value is False:
            continue
        if all(getattr(request, other) in (None, ()) for other in others):
            raise UsageError(f"{flag_of(name)} has no effect without {' or '.join(map(flag_of, others))}")


def flag_of(field: str) -> str:
    """A field's flag; that of a list is typed once for each entry."""
    return f"--{(field.removesuffix('s') if is_list(field) else field).replace('_', '-')}"


def parse_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """A request from JSON-like fields, named as `canonical` reads them; None counts as omitted.

    Raises UsageError with one sentence that names the field.
    """
    given = {name: value for name, value in canonical(fields).items() if value is not None}
    try:
        return GenerationRequest.model_validate(migrate(given))
    except ValidationError as error:
        raise UsageError(first_problem(error)) from None


def migrate(fields: dict[str, Any]) -> dict[str, Any]:
    """A request of an older schema as one of this schema: what schema 1 generated must be generated the same."""
    if fields.get("schema") in (1, "1"):
        return {"prompt_syntax": "plain", **fields, "schema": SCHEMA}
    return fields


def parse_size(text: str) -> tuple[int, int]:
    """`"512x768"` -> (512, 768), width first. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×*]\s*(\d{1,5})\s*", text)
    if not match:
        raise UsageError(f"a size is WIDTHxHEIGHT in pixels, such as 512x512, not {text!r}")
    return int(match[1]), int(match[2])


_INPUT_TYPES = {FileRef.__name__, ImageBytes.__name__}
"""What pydantic adds to the place of an error in an `ImageInput`."""


def first_problem(error: ValidationError) -> str:
    """Pydantic's first complaint as a sentence: `steps: should be at least 1, not 0`."""
    detail = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in detail["loc"] if part not in _INPUT_TYPES)
    message = in_own_words(detail["msg"])
    given = detail.get("input")
    shown = (
        f", not {given!r}" if isinstance(given, (int, float)) or (isinstance(given, str) and len(given) < 60) else ""
    )
    if detail["type"] == "value_error":
        shown = ""
    if detail["type"] == "string_unicode":
        message, shown = "has bytes that are not UTF-8 text; rename the file, if it is one", ""
    return f"{where}: {message}{shown}" if where else message


def watermark_room(width: int, height: int) -> int:
    """How many bytes of text an image of that many pixels can carry: a bit in 8x8 pixels, each three times over."""
    return max(0, width // 8 * (height // 8) // (3 * 8) - 2)


def did_you_mean(word: str, known: Any) -> str:
    """`"; did you mean 'sd15'?"`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
