"""Requests -> the condition of the denoiser: CLIP hidden states, labels of classes, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import torch

from sdcli.conditioning.condition import Condition
from sdcli.conditioning.sdxl import SdxlEncoding
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known


class Encode(Protocol):
    """Resolved requests -> their condition, a row a request, on the model's device and in its dtype."""

    def __call__(self, requests: Sequence[GenerationRequest]) -> Condition:
        """What is asked for."""

    def unconditional(self, requests: Sequence[GenerationRequest]) -> Condition:
        """What guidance leads away from."""


def encoding_of(model: LoadedModel) -> Encode:
    """The encoding that a model was trained with."""
    match model.spec.kind.conditioning:
        case "text":
            return SdxlEncoding(model) if model.is_sdxl else TextEncoding(model)
        case "class":
            return ClassEncoding(model)
        case "none":
            return NoEncoding()


class TextEncoding:
    """Encodes prompts with one text encoder, each alone and once: a picture does not depend on its neighbours.

    The condition is hidden states [B, L, D] in the model's dtype; a longer prompt is cut to the encoder's length.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encode_once = lru_cache(maxsize=256)(self._encode)

    def __call__(self, requests: Sequence[GenerationRequest]) -> Condition:
        """The hidden states of the prompts."""
        return self.texts(request.painted_prompt for request in requests)

    def unconditional(self, requests: Sequence[GenerationRequest]) -> Condition:
        """The hidden states of the negative prompts."""
        return self.texts(known(request.negative_prompt) for request in requests)

    def texts(self, texts: Iterable[str]) -> Condition:
        """The hidden states of any texts."""
        return Condition.rows([self._encode_once(text) for text in texts])

    @torch.inference_mode()
    def _encode(self, text: str) -> Condition:
        assert self._model.tokenizer is not None
        ids = torch.tensor([self._model.tokenizer(text).ids], device=self._model.device)
        return Condition({"encoder_hidden_states": self._model.text_encoder(ids)})


class ClassEncoding:
    """Names of classes (or their numbers) -> labels [B], int64; an empty name is the class that stands for none."""

    def __init__(self, model: LoadedModel) -> None:
        self._kind, self._device = model.spec.kind, model.device

    def __call__(self, requests: Sequence[GenerationRequest]) -> Condition:
        """The labels of the prompts. Raises UsageError for an unknown class."""
        return self._labels(request.painted_prompt for request in requests)

    def unconditional(self, requests: Sequence[GenerationRequest]) -> Condition:
        """The labels of the negative prompts. Raises UsageError for an unknown class."""
        return self._labels(known(request.negative_prompt) for request in requests)

    def _labels(self, names: Iterable[str]) -> Condition:
        labels = [self._kind.label(name) for name in names]
        return Condition({"class_labels": torch.tensor(labels, device=self._device)})


class NoEncoding:
    """The condition of a model that paints without a prompt."""

    def __call__(self, requests: Sequence[GenerationRequest]) -> Condition:
        """Nothing."""
        return Condition()

    def unconditional(self, requests: Sequence[GenerationRequest]) -> Condition:
        """Nothing."""
        return Condition()
