"""Feature reuse between steps: every N-th step runs the whole UNet, the others its outermost layers alone.

Consecutive steps have nearly the same deep features (Ma et al. 2023, "DeepCache", arXiv 2312.00858). A whole step keeps
the features that enter the last two layers of the last up block. The steps up to the next whole one compute those, and
the first convolution and layer, whose skip connections they take: a quarter of the operations of SD 1.5. The kept
features stand in for everything between.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.diffusion.predict import Predict
from sdcli.encoders.condition import Conditioning
from sdcli.errors import UsageError

LAYERS = 2
"""Layers of the last up block that every step computes, with a skip connection each.

With one, as DeepCache has it, the starter's images were 2 dB further from those of whole steps at the same time saved,
and further than those of fewer whole steps.
"""


class FeatureReuse:
    """The kept features of one `Predict`, which calls the UNet; `steps` maps a timestep to its step.

    A step is whole if none was before it, if the last whole one is `every` or more steps back, or if its condition
    differs from that one's, as where a prompt changes. Serves one pass of one batch.
    """

    def __init__(self, unet: Any, *, every: int, steps: Mapping[float, int]) -> None:
        self._unet, self._every, self._steps = unet, every, steps
        self._outer = OuterLayers(unet, self._features)
        self._kept: Tensor | None = None
        self._kept_at, self._kept_for = 0, Conditioning()

    def predict(self, with_network: Callable[[nn.Module], Predict], condition: Conditioning) -> Predict:
        """`with_network(network)` is the predict of a network under the condition; the result chooses the network."""
        whole, outer = with_network(self._unet), with_network(self._outer)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            step = self._steps[float(t)]
            if self._fits(step, condition):
                return outer(x, t)
            with self._keeping():
                output = whole(x, t)
            self._kept_at, self._kept_for = step, condition
            return output

        return predict

    def _fits(self, step: int, condition: Conditioning) -> bool:
        recent = self._kept is not None and 0 <= step - self._kept_at < self._every
        return recent and _equal(self._kept_for, condition)

    def _features(self) -> Tensor:
        assert self._kept is not None
        return self._kept

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Within, a call of the network keeps the features that enter the last layers."""
        skipped = self._unet.config.block_out_channels[0]

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._kept = inputs[0][:, :-skipped].clone()  # behind them are those of the skip connection

        handle = self._unet.up_blocks[-1].resnets[-LAYERS].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


class OuterLayers(nn.Module):
    """A UNet, sharing its weights, with `features()` [B, C, h, w] in place of what is between its outermost ones.

    diffusers' own forward pass does the rest: embeddings, image prompts, residuals of the skip connections.
    """

    def __init__(self, unet: Any, features: Callable[[], Tensor]) -> None:
        super().__init__()
        first = _layers_of(unet.down_blocks[0], slice(LAYERS - 1), downsamplers=None)
        last = _layers_of(unet.up_blocks[-1], slice(-LAYERS, None))
        self._network = _with_modules(
            unet,
            down_blocks=nn.ModuleList([first]),
            mid_block=_Instead(features),
            up_blocks=nn.ModuleList([last]),
        )

    def forward(self, *inputs: Any, mid_block_additional_residual: Tensor | None = None, **more: Any) -> Any:
        """As the UNet's; the residuals of ControlNets are added to the skip connections that are computed."""
        if mid_block_additional_residual is not None:  # the kept features are of a step that had its own
            more["mid_block_additional_residual"] = mid_block_additional_residual.new_zeros(())
        return self._network(*inputs, **more)


class _Instead(nn.Module):
    """A block whose output is `features()`, whatever it gets."""

    def __init__(self, features: Callable[[], Tensor]) -> None:
        super().__init__()
        self._features = features

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._features()


def _layers_of(block: nn.Module, layers: slice, **changes: nn.Module | None) -> nn.Module:
    """A block of diffusers' UNet with some of its layers."""
    lists: dict[str, Any] = {name: getattr(block, name, None) for name in ("resnets", "attentions")}
    chosen = {name: modules[layers] for name, modules in lists.items() if modules is not None}
    return _with_modules(block, **chosen, **changes)


def _with_modules(module: Any, **changes: nn.Module | None) -> nn.Module:
    """A copy of a module that shares its weights, with other modules in place of some of its own."""
    changed: nn.Module = copy.copy(module)
    changed._modules = {**module._modules, **changes}
    return changed


def _equal(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditions of one run are the same."""
    return a is b or all(rows is b.inputs[name] or torch.equal(rows, b.inputs[name]) for name, rows in a.inputs.items())


def check_reusable(unet: Any, *, name: str) -> None:
    """Raise UsageError, which calls the model `name`, for a network whose features cannot be reused."""
    first, last = (unet.config.get(f"{side}_block_types") or ["another block"] for side in ("down", "up"))
    for block, usual in ((first[0], "DownBlock2D"), (last[-1], "UpBlock2D")):
        if block not in (usual, f"CrossAttn{usual}"):
            raise UsageError(f"reuse: the UNet of {name} begins or ends with {block}, which has no layers to run alone")
    if unet.config.get("time_cond_proj_dim") is not None:
        raise UsageError(f"reuse: {name} was distilled to few steps, and each of them is needed whole")
