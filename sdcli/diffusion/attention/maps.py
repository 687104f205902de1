"""Where each token of the prompt is attended to: the UNet's cross-attention, summed up while it generates.

The maps of DAAM (Tang et al. 2022, "What the DAAM", arXiv 2210.04885): means over heads, layers and steps, at the size
of the largest layer. They are computed beside the layers' own attention, whose result stays the same to the bit. That
costs 1 to 3 % of a step of SD 1.5 at 512x512, and 13 % of one of the smallest model (scripts/bench_heatmap.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdcli.diffusion.attention.sliced import attention_layers, other_processors
from sdcli.io.lean_diffusers import UNet

Size = tuple[int, int]
"""(h, w)"""


def probabilities(attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """What a layer of diffusers' Attention weighs its values with: softmax(q k' / sqrt(d)), the mean over its heads.

    Hidden states [B, T, C] and [B, L, D] -> [B, T, L] float32; every row sums to 1.
    """
    queries, keys = (
        project(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project, states in ((attention.to_q, hidden_states), (attention.to_k, encoder_hidden_states))
    )
    scores = queries * attention.scale @ keys.transpose(-1, -2)
    return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)


@dataclass
class AttentionMaps:
    """The maps of a batch of `images`, filled step by step within `recording`.

    Where each has several `prompts`, composed by guidance, L counts the tokens of all of them.
    """

    images: int
    prompts: int = 1
    _pending: dict[Any, Tensor] = field(default_factory=dict)
    _sums: dict[Size, Tensor] = field(default_factory=dict)
    _count: int = 0

    @contextlib.contextmanager
    def recording(self, unet: UNet) -> Iterator[AttentionMaps]:
        """Within, every cross-attention of the UNet is recorded; afterwards it has its own processors again."""
        with other_processors(attention_layers(unet, ".attn2"), lambda own: _Recorded(own, self._note)):
            yield self

    def _note(self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None:
        if attention in self._pending:  # perturbed attention calls the network once more, and that does not count
            return
        # the unconditional rows come first, if there are any, then those of all images' first prompts, ...
        rows = slice(-self.images * self.prompts, None)
        weights = probabilities(attention, hidden_states[rows], encoder_hidden_states[rows])
        by_prompt = weights.unflatten(0, (self.prompts, self.images)).movedim(0, 2).flatten(2)
        self._pending[attention] = by_prompt / self.prompts

    def step(self, size: Size) -> None:
        """A step is done, on latents of that size."""
        for weights in self._pending.values():
            shape = _layer_size(size, weights.shape[1])
            self._sums[shape] = self._sums[shape] + weights if shape in self._sums else weights
            self._count += 1
        self._pending.clear()

    def mean(self, position: int) -> Tensor:
        """[L, h, w] of one image, float32 on the CPU, the size of the largest layer; each place sums to 1 over L."""
        largest = max(self._sums)
        enlarged = [
            functional.interpolate(sums[position].T.unflatten(-1, size)[None].cpu(), size=largest, mode="bilinear")[0]
            for size, sums in self._sums.items()
        ]
        return torch.stack(enlarged).sum(dim=0) / self._count


class _Recorded:
    """An attention processor as diffusers defines them: another one, whose inputs are recorded."""

    def __init__(self, processor: Any, note: Callable[[Any, Tensor, Tensor], None]) -> None:
        self._processor, self._note = processor, note

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        *more: Any,
        **rest: Any,
    ) -> Tensor:
        """Hidden states [B, T, C] -> the same shape."""
        if encoder_hidden_states is not None:
            # image prompts come beside the text: the layer attends to them apart, so they take nothing from its maps
            text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
            self._note(attention, hidden_states, text)
        mixed: Tensor = self._processor(attention, hidden_states, encoder_hidden_states, *more, **rest)
        return mixed


def _layer_size(size: Size, tokens: int) -> Size:
    """The size that the UNet halved latents to, by strides of 2, where a layer sees so many places."""
    height, width = size
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == tokens, f"a layer sees {tokens} places of latents of {size}"
    return height, width
