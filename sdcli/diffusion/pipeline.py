"""The pipeline: a loaded model with its prompt encoding, its latent space, and its refiner if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sdcli.diffusion.attention.sliced import use_sliced_self_attention
from sdcli.diffusion.input_images import InputImages
from sdcli.encoders.clip_vision import ImagePrompting
from sdcli.encoders.conditioning import (
    ClassEncoding,
    ClipReader,
    Encode,
    NoEncoding,
    Sd3Encoding,
    SdxlEncoding,
    T5Reader,
    TextEncoding,
)
from sdcli.errors import UsageError
from sdcli.models.ip_adapter import IpAdapter, with_ip_adapters
from sdcli.models.loader import LoadedModel, load_model
from sdcli.models.registry import ModelSpec
from sdcli.vae.latent_space import LatentSpace, PixelSpace, Space


def load_denoiser(spec: ModelSpec, **options: Any) -> LoadedModel:
    """`load_model` with these options, and the attention processors that are quick on the model's device."""
    model = load_model(spec, **options)
    if model.device.type == "cpu" and model.dtype != torch.float32:
        use_sliced_self_attention(model.unet)
    return model


@dataclass(frozen=True)
class Pipeline:
    """A loaded model with its prompt encoding and its latent space, ready for any number of batches.

    Its networks may be changed for the time of a batch (attention processors, VAE tiling), so one thread uses a
    pipeline, and all that share its networks, at a time: `generation.model_cache` takes care of that.
    """

    model: LoadedModel
    encode: Encode
    space: Space
    refiner: Pipeline | None = None
    """Does the last steps; it has no VAE of its own."""
    inputs: InputImages = field(default_factory=InputImages, compare=False)

    @classmethod
    def of(cls, model: LoadedModel, *, refiner: LoadedModel | None = None) -> Pipeline:
        """Raises UsageError for a refiner that does not go with the model, and for a model that is a refiner."""
        if model.is_sdxl and "text_encoder" not in model.parts:
            raise UsageError(f"{model.spec.name} is a refiner, which does the last steps of another model: --refiner")
        return cls(model, encoding_of(model), space_of(model)).with_refiner(refiner)

    def with_refiner(self, refiner: LoadedModel | None) -> Pipeline:
        """The same model with another refiner, or none. Raises UsageError for one that does not go with it."""
        if refiner is None:
            return replace(self, refiner=None)
        if not (self.model.is_sdxl and refiner.is_sdxl):
            other = refiner if self.model.is_sdxl else self.model
            raise UsageError(f"a refiner and its model are both of the sdxl family, and {other.spec.name} is not")
        return replace(self, refiner=Pipeline(refiner, encoding_of(refiner), self.space))

    def with_model(self, model: LoadedModel) -> Pipeline:
        """The same with the model's own weights changed, as by LoRAs; the refiner stays as it is."""
        return replace(Pipeline.of(model), refiner=self.refiner, inputs=self.inputs)

    def with_ip_adapters(self, adapters: Sequence[IpAdapter]) -> Pipeline:
        """The same with IP-Adapters on the model, which take the requests' images; the refiner has none."""
        encode = ImagePrompting(self.encode, tuple(adapter.look for adapter in adapters))
        return replace(self, model=with_ip_adapters(self.model, adapters), encode=encode)

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part, the refiner's too."""
        ends = self.refiner.weights() if self.refiner is not None else {}
        return {**self.model.weights(), **{f"refiner_{part}": identity for part, identity in ends.items()}}


def encoding_of(model: LoadedModel) -> Encode:
    """How the prompts of a model become conditioning."""
    kind, name, parts = model.spec.kind, model.spec.name, model.parts
    if kind.conditioning == "class":
        return ClassEncoding(kind.label, model.device)
    if kind.conditioning == "none":
        return NoEncoding()
    pairs = (("text_encoder", model.tokenizer), ("text_encoder_2", model.tokenizer_2))
    readers = [ClipReader(tokenizer, parts[part]) for part, tokenizer in pairs if tokenizer is not None]  # type: ignore[arg-type]
    unet: Any = parts["unet"].config if "unet" in parts else {}
    if kind.process == "flow":
        t5 = T5Reader(model.tokenizer_3, model.text_encoder_3) if model.tokenizer_3 is not None else None
        return Sd3Encoding(name, readers, t5=t5, transformer=unet, cell=kind.cell)
    if model.is_sdxl:
        return SdxlEncoding(name, readers, unet=unet, zeros_for_empty=model.zeros_for_empty_prompt)
    return TextEncoding(name, readers)


def space_of(model: LoadedModel) -> Space:
    """The space that a model was trained in."""
    if model.spec.kind.space == "pixel":
        return PixelSpace(model.unet.config.in_channels)
    return LatentSpace(model.vae)
