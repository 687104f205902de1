"""Prompts -> the condition of the denoiser: CLIP hidden states, one row a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from sdcli.loading import LoadedModel


class TextEncoding:
    """Encodes prompts with one model, each alone and once: a picture's condition does not depend on its neighbours."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encode_once = lru_cache(maxsize=256)(self._encode)

    def __call__(self, prompts: Iterable[str]) -> Tensor:
        """Prompts -> hidden states [B, L, D] in the model's dtype; a longer prompt is cut to the encoder's length."""
        return torch.cat([self._encode_once(prompt) for prompt in prompts])

    @torch.inference_mode()
    def _encode(self, prompt: str) -> Tensor:
        assert self._model.tokenizer is not None
        ids = torch.tensor([self._model.tokenizer(prompt).ids], device=self._model.device)
        return self._model.text_encoder(ids)
