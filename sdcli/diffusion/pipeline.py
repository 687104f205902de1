"""The pipeline: a loaded model with its prompt encoding, its latent space, and its refiner if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sdcli.diffusion.attention.sliced import (
    SELF_ATTENTION,
    SLICED,
    attention_layers,
    quick_way,
    use_sliced_self_attention,
)
from sdcli.diffusion.input_images import InputImages
from sdcli.diffusion.preview_decoder import PreviewDecoder
from sdcli.encoders.clip_vision import ImagePrompting
from sdcli.encoders.conditioning import Encode
from sdcli.errors import UsageError
from sdcli.models.ip_adapter import IpAdapter, with_ip_adapters
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec
from sdcli.vae.latent_space import Space


def load_denoiser(spec: ModelSpec, *, attention: str = "auto", **options: Any) -> LoadedModel:
    """`load_model` with these options, and the attention processors that are quick on the model's device.

    `attention` is one of `sliced.WAYS`, or auto; it matters in half precision on the CPU only. Raises UsageError.
    """
    model = load_model(spec, large_buffers=True, **options)
    half_on_cpu = model.device.type == "cpu" and model.dtype != torch.float32
    if not half_on_cpu or not attention_layers(model.unet, SELF_ATTENTION):
        return model
    way = quick_way(attention)
    if way == SLICED:
        use_sliced_self_attention(model.unet)
    return replace(model, attention=way)


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
    previews: PreviewDecoder = field(default_factory=PreviewDecoder, compare=False)

    @classmethod
    def of(cls, model: LoadedModel, *, refiner: LoadedModel | None = None) -> Pipeline:
        """Raises UsageError for a refiner that does not go with the model, and for a model that is a refiner."""
        if model.family.is_refiner(model):
            raise UsageError(f"{model.spec.name} is a refiner, which does the last steps of another model: --refiner")
        return cls(model, model.family.encoding(model), model.family.space(model)).with_refiner(refiner)

    def with_refiner(self, refiner: LoadedModel | None) -> Pipeline:
        """The same model with another refiner, or none. Raises UsageError for one that does not go with it."""
        if refiner is None:
            return replace(self, refiner=None)
        for one in (self.model, refiner):
            if not one.family.takes_refiners:
                raise UsageError(f"{one.spec.name} is not of a family with refiners; both models must be")
        if refiner.family is not self.model.family:
            raise UsageError(f"{refiner.spec.name} is not of the {self.model.family.name} family, as its model is")
        return replace(self, refiner=Pipeline(refiner, refiner.family.encoding(refiner), self.space))

    def with_model(self, model: LoadedModel) -> Pipeline:
        """The same with the model's own weights changed, as by LoRAs; the refiner stays as it is."""
        return replace(Pipeline.of(model), refiner=self.refiner, inputs=self.inputs, previews=self.previews)

    def with_ip_adapters(self, adapters: Sequence[IpAdapter]) -> Pipeline:
        """The same with IP-Adapters on the model, which take the requests' images; the refiner has none."""
        encode = ImagePrompting(self.encode, tuple(adapter.look for adapter in adapters))
        return replace(self, model=with_ip_adapters(self.model, adapters), encode=encode)

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part, the refiner's too."""
        ends = self.refiner.weights() if self.refiner is not None else {}
        return {**self.model.weights(), **{f"refiner_{part}": identity for part, identity in ends.items()}}
