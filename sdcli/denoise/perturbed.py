"""Perturbed attention: the network where every place attends only to itself, to be guided away from.

Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv 2403.17377.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sdcli.denoise.predict import Predict
from sdcli.errors import UsageError
from sdcli.lean_imports import UNet


def perturbed(predict: Predict, unet: UNet, *, name: str) -> Predict:
    """`predict` of this UNet with the self-attention of its middle block replaced by the identity, the paper's choice.

    Raises UsageError, which calls the model `name`, where there is none.
    """
    modules = unet.named_modules()
    layers = [module for path, module in modules if path.startswith("mid_block.") and path.endswith(".attn1")]
    if not layers:
        raise UsageError(f"pag_scale has no effect: {name} has no self-attention in the middle of its UNet")

    def predict_(x: Tensor, t: Tensor) -> Tensor:
        with _perturbing(layers):
            return predict(x, t)

    return predict_


@contextlib.contextmanager
def _perturbing(layers: list[Any]) -> Iterator[None]:
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = _EachItself()
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


class _EachItself:
    """An attention processor as diffusers defines them: each place gets its own value."""

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states [B, T, C] -> the same shape."""
        values = attention.to_v(hidden_states)
        for layer in attention.to_out:
            values = layer(values)
        return values
