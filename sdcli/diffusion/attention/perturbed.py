"""Perturbed attention: the network where every place attends only to itself, as guidance needs it.

Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv 2403.17377.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdcli.diffusion.attention.sliced import attention_layers, other_processors
from sdcli.diffusion.predict import Predict
from sdcli.errors import UsageError
from sdcli.io.lean_diffusers import UNet


def perturbed(predict: Predict, unet: UNet, *, name: str) -> Predict:
    """`predict` of this UNet with the self-attention of its middle block replaced by the identity, the paper's choice.

    Raises UsageError, which calls the model `name`, where there is none.
    """
    layers = attention_layers(unet, ".attn1", within="mid_block.")
    if not layers:
        raise UsageError(f"pag_scale has no effect: {name} has no self-attention in the middle of its UNet")

    def predict_(x: Tensor, t: Tensor) -> Tensor:
        with other_processors(layers, lambda _: _EachItself()):
            return predict(x, t)

    return predict_


class _EachItself:
    """An attention processor as diffusers defines them: each place gets its own value."""

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hidden states [B, T, C] -> the same shape."""
        values = attention.to_v(hidden_states)
        for layer in attention.to_out:
            values = layer(values)
        return values
