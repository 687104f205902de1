"""Attention for half precision on the CPU, where torch's own kernel is slow at the shapes that the SD UNet has.

Generating: the many-token, few-channel self-attention takes 35 to 46 % of a step for 16 % of its operations. Plain
matrix products over slices that stay in the cache take 0.7 of its time at 4096 tokens of 40 channels on a 2-core AMD
EPYC with avx512_bf16, but 1.8 times its time on a 2-core Intel Xeon with AMX, whose tiles the kernel uses.

Training: the kernel's backward pass in bfloat16 takes two to four times as long as plain matrix products where there
are few tokens (64 queries, 32 keys, 4 heads of 32, batch 64: 18.4 ms and 5.3 ms; 64 keys: 20.5 and 11.0 ms), and less
from 256 tokens on, on a 2-core AMD EPYC.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdcli.errors import UsageError
from sdcli.io.devices import cpu_flags
from sdcli.io.lean_diffusers import UNet

SLICE = 512
"""Query rows at a time; 512 x 4096 scores in bfloat16 are 4 MiB."""
FEWEST_TOKENS = 256
MOST_PLAIN_TOKENS = 128

SELF_ATTENTION = ".attn1"
SLICED, SDPA = "sliced", "sdpa"
WAYS = (SLICED, SDPA)
"""How self-attention can be computed in half precision on the CPU; the bytes of images differ."""
VARIABLE = "SDCLI_ATTENTION"


def quick_way(attention: str = "auto") -> str:
    """This one of WAYS; auto is that of SDCLI_ATTENTION, else SDPA on a CPU with AMX and sliced on others.

    Raises UsageError for anything else in the variable.
    """
    chosen = os.environ.get(VARIABLE) or "auto" if attention == "auto" else attention
    if chosen == "auto":
        return SDPA if "amx_tile" in cpu_flags() else SLICED
    if chosen not in WAYS:
        raise UsageError(f"{VARIABLE} is {chosen!r}, but should be auto, {' or '.join(WAYS)}")
    return chosen


def attention_layers(unet: UNet, ending: str | tuple[str, ...], *, within: str = "") -> list[Any]:
    """The layers of a UNet whose path begins and ends so; .attn1 is self-attention, .attn2 cross-attention."""
    paths = unet.named_modules()
    return [module for path, module in paths if path.startswith(within) and path.endswith(ending)]


@contextlib.contextmanager
def other_processors(layers: Sequence[Any], other: Callable[[Any], Any]) -> Iterator[None]:
    """Within, each layer has the processor that `other` makes of its own; afterwards its own again."""
    own = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(other(layer.processor))
        yield
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.set_processor(processor)


def use_sliced_self_attention(unet: UNet) -> None:
    """Give the self-attention layers of a half-precision UNet on the CPU the processor below."""
    for layer in attention_layers(unet, SELF_ATTENTION):
        layer.set_processor(SlicedSelfAttention(layer.processor))


def use_plain_small_attention(unet: UNet) -> None:
    """Give the attention layers of a UNet that is trained in half precision on the CPU the processor below."""
    for layer in attention_layers(unet, (".attn1", ".attn2")):
        layer.set_processor(PlainSmallAttention(layer.processor))


class PlainSmallAttention:
    """An attention processor as diffusers defines them: the plain one where there are few tokens."""

    def __init__(self, otherwise: Any) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        self._plain, self._otherwise = AttnProcessor(), otherwise

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *more: Any,
        **rest: Any,
    ) -> Tensor:
        """Hidden states [B, T, C] -> the same shape."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        few = max(hidden_states.shape[1], keys.shape[1]) <= MOST_PLAIN_TOKENS
        processor = self._plain if few and hidden_states.ndim == 3 else self._otherwise
        mixed: Tensor = processor(attention, hidden_states, encoder_hidden_states, *more, **rest)
        return mixed


class SlicedSelfAttention:
    """An attention processor as diffusers defines them, for the layers of `BasicTransformerBlock.attn1`."""

    def __init__(self, otherwise: Any) -> None:
        self._otherwise = otherwise

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """Hidden states [B, T, C] -> the same shape; what this form is not for goes to the usual processor."""
        plain = encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3
        if not plain or hidden_states.shape[1] < FEWEST_TOKENS:
            return self._otherwise(attention, hidden_states, encoder_hidden_states, attention_mask, **rest)
        queries, keys, values = (
            project(hidden_states).unflatten(-1, (attention.heads, -1))
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        return attention.to_out[0](sliced_attention(queries, keys, values).flatten(2))


def sliced_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v for [B, T, H, D] tensors, one head and one slice of queries at a time.

    The keys' mean is taken off first: it changes no weight (softmax ignores what is added to a whole row), but makes
    the scores small, so that rounding them to half precision costs less (Zhang et al. 2024, SageAttention).
    """
    batch, tokens, heads, size = queries.shape
    queries = queries * size**-0.5
    keys = keys - keys.mean(dim=1, keepdim=True, dtype=torch.float32).to(keys.dtype)
    mixed = torch.empty_like(values)
    for b in range(batch):
        for h in range(heads):
            q, k, v = queries[b, :, h].contiguous(), keys[b, :, h].contiguous().t(), values[b, :, h].contiguous()
            for start in range(0, tokens, SLICE):
                weights = torch.softmax(q[start : start + SLICE] @ k, dim=-1)
                mixed[b, start : start + SLICE, h] = weights @ v
    return mixed
