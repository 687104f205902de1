"""SDXL's condition: the penultimate hidden states of its text encoders, an embedding of the text, and sizes.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv 2307.01952),
sections 2.1, 2.2 and 2.5; every number as in diffusers' StableDiffusionXLPipeline (tests/test_sdxl.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sdcli.conditioning.condition import Condition
from sdcli.errors import BadWeights
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What the refiner is told of the picture, and of what guidance leads away from; diffusers' defaults."""
TOP_LEFT = (0, 0)
"""Where the picture was cut from its original: nowhere, so its subject stays whole."""


class SdxlEncoding:
    """Encodes requests for SDXL's base model (two text encoders) or its refiner (the second one alone).

    A longer prompt is cut to the encoders' length. The tensors are in the model's dtype, `time_ids` in float32, where
    every size is exact.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encode_once = lru_cache(maxsize=256)(self._encode)

    def __call__(self, requests: Sequence[GenerationRequest]) -> Condition:
        """What is asked for. Raises BadWeights where UNet and text encoders do not fit together."""
        texts = [self._encode_once(request.painted_prompt) for request in requests]
        return self._with_sizes(texts, requests, score=AESTHETIC_SCORE)

    def unconditional(self, requests: Sequence[GenerationRequest]) -> Condition:
        """The negative prompts; an empty one is all zeros with the models that were trained so."""
        texts = [self._negative(known(request.negative_prompt)) for request in requests]
        return self._with_sizes(texts, requests, score=NEGATIVE_AESTHETIC_SCORE)

    def _negative(self, text: str) -> Condition:
        encoded = self._encode_once(text)
        if text or not self._model.zeros_for_empty_prompt:
            return encoded
        return Condition({name: torch.zeros_like(rows) for name, rows in encoded.inputs.items()})

    @torch.inference_mode()
    def _encode(self, text: str) -> Condition:
        """`encoder_hidden_states` [1, L, D1 + D2] and `text_embeds` [1, P] of one text."""
        model = self._model
        assert model.tokenizer_2 is not None
        states = []
        if model.tokenizer is not None:
            states.append(model.text_encoder.hidden_states(self._ids(model.tokenizer(text).ids))[-2])
        ids = self._ids(model.tokenizer_2(text).ids)
        *_, penultimate, last = model.text_encoder_2.hidden_states(ids)
        hidden = torch.cat([*states, penultimate], dim=-1)
        return Condition({"encoder_hidden_states": hidden, "text_embeds": model.text_encoder_2.pooled(last, ids)})

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self._model.device)

    def _with_sizes(
        self, texts: Sequence[Condition], requests: Sequence[GenerationRequest], *, score: float
    ) -> Condition:
        condition = Condition.rows(texts)
        room = self._room_for_numbers(condition)
        rows = []
        for request in requests:
            size = (known(request.height), known(request.width))  # of the original, and of what is wanted
            rows.append([*size, *TOP_LEFT, *((score,) if room == 5 else size)])
        time_ids = torch.tensor(rows, dtype=torch.float32, device=self._model.device)
        return Condition({**condition.inputs, "time_ids": time_ids})

    def _room_for_numbers(self, condition: Condition) -> int:
        """How many numbers the UNet takes beside the texts: 6 for sizes, 5 where a score stands for the last two."""
        config, inputs = self._model.unet.config, condition.inputs
        rest = (config.get("projection_class_embeddings_input_dim") or 0) - inputs["text_embeds"].shape[-1]
        room, odd = divmod(rest, config.get("addition_time_embed_dim") or 1)
        if (
            config.get("addition_embed_type") != "text_time"
            or config.cross_attention_dim != inputs["encoder_hidden_states"].shape[-1]
            or odd
            or room not in (5, 6)
        ):
            raise BadWeights(f"{self._model.spec.name}: its UNet does not fit its text encoders")
        return room
