"""Prompts -> the condition of the denoiser: CLIP hidden states, labels of classes, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from sdcli.conditioning.condition import Condition
from sdcli.loading import LoadedModel

Encode = Callable[[Iterable[str]], Condition]
"""Prompts -> their condition, a row a prompt, on the model's device and in its dtype."""


def encoding_of(model: LoadedModel) -> Encode:
    """The encoding that a model was trained with."""
    match model.spec.kind.conditioning:
        case "text":
            return TextEncoding(model)
        case "class":
            return ClassEncoding(model)
        case "none":
            return no_condition


class TextEncoding:
    """Encodes prompts with one model, each alone and once: a picture's condition does not depend on its neighbours."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encode_once = lru_cache(maxsize=256)(self._encode)

    def __call__(self, prompts: Iterable[str]) -> Condition:
        """Prompts -> hidden states [B, L, D] in the model's dtype; a longer prompt is cut to the encoder's length."""
        return Condition.rows([self._encode_once(prompt) for prompt in prompts])

    @torch.inference_mode()
    def _encode(self, prompt: str) -> Condition:
        assert self._model.tokenizer is not None
        ids = torch.tensor([self._model.tokenizer(prompt).ids], device=self._model.device)
        return Condition({"encoder_hidden_states": self._model.text_encoder(ids)})


class ClassEncoding:
    """Names of classes (or their numbers) -> labels; an empty name is the class that stands for none."""

    def __init__(self, model: LoadedModel) -> None:
        self._kind, self._device = model.spec.kind, model.device

    def __call__(self, prompts: Iterable[str]) -> Condition:
        """Prompts -> labels [B], int64. Raises UsageError for an unknown class."""
        labels = [self._kind.label(prompt) for prompt in prompts]
        return Condition({"class_labels": torch.tensor(labels, device=self._device)})


def no_condition(prompts: Iterable[str]) -> Condition:
    """The condition of a model that paints without a prompt."""
    return Condition()
