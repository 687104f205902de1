"""Images as prompts: a CLIP vision encoder, and a prompt encoding that adds its embeddings to the text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdcli.encoders.condition import IMAGES, Conditioning, ConditioningSchedule
from sdcli.encoders.conditioning import Encode
from sdcli.encoders.token_words import Context
from sdcli.errors import BadImage, BadWeights, first_line
from sdcli.images.image_files import image_from_bytes
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import full_imports
from sdcli.io.weight_files import files_digest, in_background, shards
from sdcli.io.weights import empty_network, fill, read_tensors
from sdcli.request.fields import ImageInput
from sdcli.request.input_files import read_pinned
from sdcli.request.schema import ResolvedRequest

CONFIG = "config.json"
LONGEST = 64
"""How many times longer than wide an image may be: the encoder takes the square in its middle, enlarged."""
_SETTINGS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
"""The settings read from a configuration. The others do not affect the shape, and could name code to download."""


class ImageEncoder:
    """A CLIP vision encoder in memory. It remembers the images that it was shown last."""

    def __init__(self, network: Any, *, folder: Path, identity: Future[str]) -> None:
        self.network, self.folder, self.identity = network, folder, identity
        self.pixels = lru_cache(maxsize=64)(self._pixels)
        self.embedding = lru_cache(maxsize=64)(self._embedding)

    def _pixels(self, ref: ImageInput) -> Tensor:
        """[1, 3, S, S], normalised as CLIP was trained. Raises NotFound, BadPicture and UsageError."""
        with full_imports():
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        image, side = image_from_bytes(read_pinned(ref), name=str(ref)), self.network.config.image_size
        if max(image.size) > LONGEST * min(image.size):
            shape = f"{image.width}x{image.height}"
            raise BadImage(f"{ref}: is {shape} pixels; an image that prompts is at most {LONGEST} times as long")
        pixels: Tensor = CLIPImageProcessorPil(size=side, crop_size=side)(image, return_tensors="pt").pixel_values
        return pixels

    @torch.inference_mode()
    def _embedding(self, image: ImageInput | None, *, whole: bool) -> Tensor:
        """[1, P] of a whole image, or [1, T, D] of its patches before the last layer; without one, as in training:
        zeros, or the patches of an image that is zero. Raises what `pixels` raises.
        """
        config, parameter = self.network.config, next(self.network.parameters())
        if image is None and whole:
            return parameter.new_zeros((1, config.projection_dim))
        grey = torch.zeros(1, 3, config.image_size, config.image_size)
        seen = (self.pixels(image) if image is not None else grey).to(parameter)
        output = self.network(seen, output_hidden_states=not whole)
        found: Tensor = output.image_embeds if whole else output.hidden_states[-2]
        return found


@dataclass(frozen=True)
class Look:
    """The image embeddings of one IP-Adapter."""

    encoder: ImageEncoder
    whole: bool

    def __call__(self, images: Sequence[ImageInput | None]) -> Tensor:
        """[B, 1, P] or [B, 1, T, D]; each image is encoded alone, so that it does not depend on its batch."""
        return torch.stack([self.encoder.embedding(image, whole=self.whole) for image in images])


@dataclass(frozen=True)
class ImagePrompting:
    """An encoding of prompts that adds, for each IP-Adapter, the embedding of the request's image."""

    encode: Encode
    looks: tuple[Look, ...]

    def __call__(self, requests: Sequence[ResolvedRequest], *, guided: bool, steps: int) -> ConditioningSchedule:
        """The text's conditions with `image_embeds:N`; the unconditional rows see no image."""
        conditions = self.encode(requests, guided=guided, steps=steps)
        nothing = [None] * len(requests) if guided else []

        @cache
        def seen(prompts: int) -> dict[str, Tensor]:
            return {
                f"{IMAGES}:{n}": look([*nothing, *[one.ip_adapters[n].image for one in requests] * prompts])
                for n, look in enumerate(self.looks)
            }

        def at(step: int) -> Conditioning:
            text = conditions.at(step).inputs
            rows = len(text["encoder_hidden_states"]) - len(nothing)
            return Conditioning({**text, **seen(rows // len(requests))})

        return ConditioningSchedule(at, changes=conditions.changes, weights=conditions.weights)

    def shape(self, request: ResolvedRequest) -> Hashable:
        """That of the text. Raises also what reading the request's images raises."""
        for look, one in zip(self.looks, request.ip_adapters, strict=True):
            look.encoder.pixels(one.image)
        return self.encode.shape(request)

    def read(self, request: ResolvedRequest) -> Context:
        """The tokens of the text."""
        return self.encode.read(request)


def load_image_encoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """The CLIPVisionModelWithProjection of a folder as transformers writes it. Raises NotFound and BadWeights."""
    with full_imports():
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    stated, files = read_json_object(folder / CONFIG), shards(folder, "model")
    try:
        config = CLIPVisionConfig(**{name: stated[name] for name in _SETTINGS if name in stated})
    except Exception as error:  # transformers has errors of its own for this
        raise BadWeights(f"{folder / CONFIG} describes no image encoder: {first_line(error)}") from None
    network: Any = empty_network(lambda: CLIPVisionModelWithProjection(config), source=str(folder))
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file, dtype, rename=_of_vision).items()}
    fill(network, tensors, source=str(files[0]))
    embeddings = network.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # no file has them
    (identity,) = in_background(partial(files_digest, files))
    return ImageEncoder(network.to(device), folder=folder, identity=identity)


def _of_vision(name: str) -> str | None:
    """Only the vision part of a whole CLIP; older files store a list of positions, which is not a weight."""
    seeing = name.startswith(("vision_model.", "visual_projection."))
    return name if seeing and not name.endswith("position_ids") else None
