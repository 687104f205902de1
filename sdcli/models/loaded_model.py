"""A model in memory: its networks, its tokenizers, and which weights they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sdcli.encoders.clip import ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.io.lean_diffusers import VAE
from sdcli.io.weight_files import finished
from sdcli.models.families import family_from_scratch
from sdcli.models.families.family import Configs, Family
from sdcli.models.registry import ModelSpec
from sdcli.request.fields import FileRef, LoraRef


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA that is merged into a model's weights."""

    ref: LoraRef
    layers: int
    """How many layers of the model it changes."""
    unmatched: tuple[str, ...]
    """What else is in the file, by its names: layers that the model does not have, and tensors of no LoRA."""
    tensors_sha256: str
    """64 hex digits of the file behind its header: what the web UI and Civitai know a LoRA by."""
    notes: tuple[str, ...] = ()
    """What was not taken over of the file, or had to be assumed."""


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a model, ready to compute with; a part that was not loaded raises AttributeError."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    scheduler_config: Mapping[str, Any]
    parts: Mapping[str, nn.Module]
    tokenizers: Mapping[str, Any]
    """Text encoder -> its tokenizer."""
    identities: Mapping[str, Future[str]] = field(repr=False)
    """Of the parts as they were loaded, without the LoRAs."""
    loras: tuple[AppliedLora, ...] = ()
    ip_adapters: tuple[tuple[FileRef, float], ...] = ()
    """What the UNet attends to beside the text, each with its weight."""
    attention: str | None = None
    """How the UNet's self-attention is computed, where there are several ways."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """model_index.json: what its family may need beside the parts."""

    @property
    def family(self) -> Family:
        return self.spec.family

    @cached_property
    def unet(self) -> Any:
        """The denoiser."""
        return self._part("unet")

    @cached_property
    def vae(self) -> VAE:
        vae: VAE = self._part("vae")
        return vae

    @cached_property
    def text_encoder(self) -> ClipTextEncoder:
        """The first text encoder."""
        encoder: ClipTextEncoder = self._part("text_encoder")
        return encoder

    @property
    def tokenizer(self) -> ClipTokenizer | None:
        """That of the first text encoder."""
        return self.tokenizers.get("text_encoder")

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise AttributeError(f"the {name} of {self.spec.name} was not loaded")
        return self.parts[name]

    def identity(self, part: str) -> str:
        """Which weights a part has: `sha256:<64 hex digits>` of its file, or `random:<architecture>:<seed>`."""
        return self.identities[part].result()

    def weights(self) -> dict[str, str]:
        """The identity of every loaded part."""
        return {part: self.identity(part) for part in self.parts}


def model_in_memory(
    spec: ModelSpec,
    *,
    scheduler_config: Mapping[str, Any],
    tokenizers: Mapping[str, ClipTokenizer] | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    identity: str = "memory",
    **networks: nn.Module,
) -> LoadedModel:
    """A model of networks made in memory: `unet`, and `vae` and text encoders (with tokenizers) if it has them.

    What it generates from, and on what, is read from the networks' own configurations; of the spec its name, defaults
    and, where it fits, family are used, and its source need not exist. `classes` names the classes of a
    class-conditional UNet. Device and dtype are those of the UNet.
    Raises UsageError and BadWeights where the networks do not fit together.
    """
    unet: Any = networks["unet"]
    vae: Any = networks.get("vae")
    named = None if classes is None else tuple(classes)
    family, reads_text = spec.family, "text_encoder" in networks
    if family.reads_text != reads_text:
        has_classes = unet.config.get("num_class_embeds") is not None
        family = family_from_scratch(reads_text=reads_text, has_classes=has_classes)
    kind = family.describe(Configs(unet.config, None if vae is None else vae.config, named, spec.name))
    parameter = next(unet.parameters())
    return LoadedModel(
        spec=spec.model_copy(update={"kind": kind, "family": family}),
        device=parameter.device,
        dtype=parameter.dtype,
        scheduler_config=scheduler_config,
        parts=networks,
        tokenizers=tokenizers or {},
        identities=dict.fromkeys(networks, finished(identity)),
        settings=settings or {},
    )
