"""Muon for matrices and convolutions, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix before
the update. torch.optim.Muon takes matrices only; here a convolution is treated as a matrix with a row for each output
channel, and other parameters (biases, norms, embeddings, the first and last layer) get AdamW. With --sharding full the
update of a matrix is gathered, one at a time; every process orthogonalises it and changes its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdcli.training.state.rows import has_rows, like_rows

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, chosen by Jordan et al. for its slope at 0."""
NOT_HIDDEN = ("embedding", "conv_in.", "conv_out.")
"""Parts of the names of input and output layers."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter."""
    return parameter.ndim >= 2 and not any(part in name for part in NOT_HIDDEN)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix [m, n] with singular values of about 0.7 to 1.2, in bfloat16, by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonWithAdamW(torch.optim.AdamW):
    """The optimizer, with parameter groups as for AdamW; `names` are the parameters' names in the order of the groups.

    The update of a matrix [m, n] is scaled by 0.2 sqrt(max(m, n)), so that its root mean square is that of AdamW
    (Liu et al. 2025, arXiv 2502.16982), and both use the same learning rate and weight decay.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, names: Sequence[str], **adam: Any) -> None:
        super().__init__([dict(group) for group in groups], **adam)
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        named = zip(names, every, strict=True)
        self._matrices = {id(parameter) for name, parameter in named if is_hidden_matrix(name, parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._matrices and parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        with self._without_matrices():
            super().step()
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects it in every state
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update: Any = gradient.lerp(momentum, MOMENTUM)  # Nesterov momentum
        if has_rows(update):
            update = update.full_tensor()
        direction = orthogonal(update.flatten(1))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(direction.shape))
        change = direction.to(parameter.dtype).reshape(parameter.shape)
        parameter.add_(like_rows(parameter, change) if has_rows(parameter) else change, alpha=-rate)

    @contextmanager
    def _without_matrices(self) -> Iterator[None]:
        whole = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in self._matrices]
        try:
            yield
        finally:
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters
