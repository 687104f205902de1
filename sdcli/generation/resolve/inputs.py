"""The files that a request names: each gets its digest, and an init image decides the size and strength it can."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdcli.errors import UsageError
from sdcli.models.adapter_files import is_in_folder, lora_not_found, pinned_ip_adapter, pinned_lora
from sdcli.request.fields import EmbeddingRef, ImageInput
from sdcli.request.input_files import is_latents, pinned
from sdcli.request.lora_tags import take_tags
from sdcli.request.schema import GenerationRequest, ResolvedRequest, flag_of

STRENGTH, STRENGTH_BEHIND_MASK = 0.8, 1.0
"""The shares of noise that diffusers' pipelines have."""
MASK_BLUR = 4.0
_WORD = re.compile(r"[^\s()\[\]:|\\]{1,100}")

Measure = Callable[[ImageInput, int], tuple[int, int]]
"""(an image or latent file, pixels a side of a latent cell) -> its width and height in pixels."""


def start_filled(request: GenerationRequest, *, step: int, cell: int, measure: Measure | None) -> dict[str, Any]:
    """The fields that a start image decides, where the request leaves them open; sizes are multiples of `step`.

    `cell` is how many pixels a side a cell of the model's latents stands for.

    Raises UsageError for what does not go with it, and what reading the files raises.
    """
    if request.init_image is None:
        return {}
    if request.masked and is_latents(request.init_image):
        raise UsageError(f"{flag_of('mask' if request.mask else 'extend')} needs an image to start from, not latents")
    if request.masked and request.upscale is not None:
        raise UsageError("--upscale does not go with a mask or --extend: what is kept could not stay as it is")
    filled: dict[str, Any] = {"init_image": pinned(request.init_image)}
    if request.mask is not None:
        if str(request.mask) == "-" == str(request.init_image):
            raise UsageError("the init image and the mask cannot both be read from stdin")
        filled["mask"] = pinned(request.mask)
    if request.masked and request.mask_blur is None:
        filled["mask_blur"] = MASK_BLUR
    if request.strength is None:
        filled["strength"] = STRENGTH_BEHIND_MASK if request.masked else STRENGTH
    if measure is not None:
        filled |= _size(request, measure(filled["init_image"], cell), step)
    return filled


def _size(request: GenerationRequest, own: tuple[int, int], step: int) -> dict[str, int]:
    """The image's own size, cut to multiples of `step`; with one side typed, the other keeps its proportions."""
    width, height = (side // step * step for side in own)
    if not width or not height:
        raise UsageError(f"{request.init_image}: is {own[0]}x{own[1]} pixels; at least {step}x{step} are needed")
    if request.extend is not None:
        extend = request.extend
        for side, pixels in extend:
            if pixels % step:
                raise UsageError(f"extend: {side} should be a multiple of {step}, not {pixels}")
        size = (width + extend.left + extend.right, height + extend.top + extend.bottom)
        typed = (request.width or size[0], request.height or size[1])
        if typed != size:
            asked = f"{typed[0]}x{typed[1]}"
            raise UsageError(f"--extend makes the image {size[0]}x{size[1]}, and {asked} is asked for")
        return {"width": size[0], "height": size[1]}
    if is_latents(request.init_image) and (request.width or width, request.height or height) != (width, height):
        raise UsageError(f"{request.init_image} holds latents of an image of {width}x{height}; they keep their size")
    if request.width is None and request.height is not None:
        width = max(step, round(width * request.height / height / step) * step)
    elif request.height is None and request.width is not None:
        height = max(step, round(height * request.width / width / step) * step)
    return {"width": request.width or width, "height": request.height or height}


def controls_filled(request: GenerationRequest) -> dict[str, Any]:
    """The controls with the digests of their images. Raises what reading the files raises."""
    if not request.controls:
        return {}
    return {"controls": tuple(one.model_copy(update={"image": pinned(one.image)}) for one in request.controls)}


def image_prompts_filled(request: GenerationRequest) -> dict[str, Any]:
    """The IP-Adapters with the digests of their files and images. Raises what reading the files raises."""
    if not request.ip_adapters:
        return {}
    prompts = (
        one.model_copy(update={"adapter": pinned_ip_adapter(one.adapter), "image": pinned(one.image)})
        for one in request.ip_adapters
    )
    return {"ip_adapters": tuple(prompts)}


def pinned_embeddings(embeddings: Sequence[EmbeddingRef]) -> tuple[EmbeddingRef, ...]:
    """Embeddings with the word of each (by default its file's name) and its digest.

    Raises UsageError for what is no .safetensors file, for a word that cannot stand in a prompt and for two of one
    word, and what `pinned` raises.
    """
    complete = tuple(_pinned_embedding(embedding) for embedding in embeddings)
    words = [embedding.word.lower() for embedding in complete]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise UsageError(f"embeddings: two of them stand for {twice!r}; name one's word: FILE=WORD")
    return complete


def _pinned_embedding(embedding: EmbeddingRef) -> EmbeddingRef:
    path = Path(embedding.path)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"embeddings: {path} is no .safetensors file, the only kind that sdcli reads")
    word = embedding.word
    if not _WORD.fullmatch(word):
        raise UsageError(f"embeddings: {word!r} cannot be a word of a prompt; name another: FILE=WORD")
    return embedding.model_copy(update={"token": word, "sha256": pinned(embedding).sha256})


def find_loras(request: ResolvedRequest, folder: Path | None) -> ResolvedRequest:
    """A resolved request with its LoRAs found: tags of the prompt became entries, and every entry has its digest.

    Names are looked up in `folder`, or in the user's own. Raises UsageError for a tag that names no LoRA there, and
    what `pinned_lora` raises.
    """
    prompt, tagged = take_tags(request.prompt)
    template, more = take_tags(request.prompt_template)
    for ref in (*tagged, *more):
        if not is_in_folder(ref, folder):
            raise UsageError(lora_not_found(ref.path, folder))
    refs = tuple(pinned_lora(ref, folder) for ref in (*request.loras, *tagged, *more))
    if not refs:
        return request
    return request.model_copy(update={"prompt": prompt, "prompt_template": template, "loras": refs})
