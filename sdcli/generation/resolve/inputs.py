"""The files that a request names: their digests, and the fields whose defaults depend on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdcli.errors import UsageError
from sdcli.models.adapter_files import is_in_folder, lora_not_found, pinned_ip_adapter, pinned_lora
from sdcli.models.layout import ModelKind
from sdcli.models.registry import ModelSpec
from sdcli.request.fields import EmbeddingRef, ImageInput
from sdcli.request.input_files import is_latents, pinned
from sdcli.request.lora_tags import check_negative, take_tags
from sdcli.request.schema import GenerationRequest, ResolvedRequest, flag_of

STRENGTH, STRENGTH_WITH_MASK = 0.8, 1.0
"""The defaults of diffusers' pipelines."""
MASK_BLUR = 4.0
_WORD = re.compile(r"[^\s()\[\]:|\\]{1,100}")

Measure = Callable[[ImageInput, int], tuple[int, int]]
"""(an image or latent file, pixels a side of a latent cell) -> its width and height in pixels."""


def input_values(request: GenerationRequest, spec: ModelSpec, measure: Measure | None) -> dict[str, Any]:
    """The fields that name images or adapters, with the digests of the files, and the fields that follow from them.

    Raises UsageError for an init image that does not fit the other fields, and what reading the files raises.
    """
    values = _init_image_values(request, spec.kind, measure)
    if request.controls:
        values["controls"] = tuple(one.model_copy(update={"image": pinned(one.image)}) for one in request.controls)
    if request.ip_adapters:
        values["ip_adapters"] = tuple(
            one.model_copy(update={"adapter": pinned_ip_adapter(one.adapter), "image": pinned(one.image)})
            for one in request.ip_adapters
        )
    return values


def _init_image_values(request: GenerationRequest, kind: ModelKind, measure: Measure | None) -> dict[str, Any]:
    """The init image and the mask with their digests; strength, blur and size where the request leaves them open."""
    if request.init_image is None:
        return {}
    if request.masked and is_latents(request.init_image):
        raise UsageError(f"{flag_of('mask' if request.mask else 'extend')} needs an image to start from, not latents")
    if request.masked and request.upscale is not None:
        raise UsageError("--upscale does not go with a mask or --extend: what is kept could not stay as it is")
    values: dict[str, Any] = {"init_image": pinned(request.init_image)}
    if request.mask is not None:
        if str(request.mask) == "-" == str(request.init_image):
            raise UsageError("the init image and the mask cannot both be read from stdin")
        values["mask"] = pinned(request.mask)
    if request.masked and request.mask_blur is None:
        values["mask_blur"] = MASK_BLUR
    if request.strength is None:
        values["strength"] = STRENGTH_WITH_MASK if request.masked else STRENGTH
    if measure is not None:
        values |= _size(request, measure(values["init_image"], kind.cell), kind.size_step)
    return values


def _size(request: GenerationRequest, own: tuple[int, int], step: int) -> dict[str, int]:
    """The image's own size, cut to multiples of `step`; with one side given, the other keeps the proportions."""
    width, height = (side // step * step for side in own)
    if not width or not height:
        raise UsageError(f"{request.init_image}: is {own[0]}x{own[1]} pixels; at least {step}x{step} are needed")
    if request.extend is not None:
        extend = request.extend
        for side, pixels in extend:
            if pixels % step:
                raise UsageError(f"extend: {side} should be a multiple of {step}, not {pixels}")
        size = (width + extend.left + extend.right, height + extend.top + extend.bottom)
        given = (request.width or size[0], request.height or size[1])
        if given != size:
            raise UsageError(f"--extend makes the image {size[0]}x{size[1]}, not {given[0]}x{given[1]}; omit the size")
        return {"width": size[0], "height": size[1]}
    if is_latents(request.init_image) and (request.width or width, request.height or height) != (width, height):
        raise UsageError(f"{request.init_image} holds latents of an image of {width}x{height}; they keep their size")
    if request.width is None and request.height is not None:
        width = max(step, round(width * request.height / height / step) * step)
    elif request.height is None and request.width is not None:
        height = max(step, round(height * request.width / width / step) * step)
    return {"width": request.width or width, "height": request.height or height}


def pinned_embeddings(embeddings: Sequence[EmbeddingRef]) -> tuple[EmbeddingRef, ...]:
    """Embeddings with their words (default: the file's name) and digests.

    Raises UsageError for a file that is not .safetensors, for a word that a prompt cannot contain and for a word that
    two of them have, and what `pinned` raises.
    """
    complete = tuple(_pinned_embedding(embedding) for embedding in embeddings)
    words = [embedding.word.lower() for embedding in complete]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UsageError(f"embeddings: two of them have the word {twice!r}; name one's word: FILE=WORD")
    return complete


def _pinned_embedding(embedding: EmbeddingRef) -> EmbeddingRef:
    path = Path(embedding.path)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"embeddings: {path} is not a .safetensors file, the only kind that sdcli reads")
    word = embedding.word
    if not _WORD.fullmatch(word):
        raise UsageError(f"embeddings: {word!r} cannot be a word of a prompt; name another: FILE=WORD")
    return embedding.model_copy(update={"token": word, "sha256": pinned(embedding).sha256})


def find_loras(request: ResolvedRequest, folder: Path | None) -> ResolvedRequest:
    """A resolved request with the digests of its LoRAs; tags in its prompts become entries of `loras`.

    Names are looked up in `folder`, or in the user's own. Raises UsageError for a tag that names no LoRA there, is of
    another kind, or stands in the negative prompt, and what `pinned_lora` raises.
    """
    syntax = request.prompt_syntax
    prompt, tagged = take_tags(request.prompt, syntax=syntax)
    template, more = take_tags(request.prompt_template, syntax=syntax)
    check_negative(request.negative_prompt, syntax=syntax)
    for ref in (*tagged, *more):
        if not is_in_folder(ref, folder):
            raise UsageError(lora_not_found(ref.path, folder))
    refs = tuple(pinned_lora(ref, folder) for ref in (*request.loras, *tagged, *more))
    if not refs:
        return request
    return request.model_copy(update={"prompt": prompt, "prompt_template": template, "loras": refs})
