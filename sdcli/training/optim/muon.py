"""Muon for matrices and convolutions, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix nearly orthogonal
before it is a step. torch.optim.Muon takes matrices alone; here a convolution is the matrix of its output channels by
all else, and parameters that are no hidden matrix (biases, norms, embeddings, the first and last layer) get AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, chosen by Jordan et al. for their slope at 0."""
NO_HIDDEN_MATRIX = ("embedding", "conv_in.", "conv_out.")
"""Parts of names of layers that take or give numbers of another meaning than channels."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for this parameter."""
    return parameter.ndim >= 2 and not any(part in name for part in NO_HIDDEN_MATRIX)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix [m, n] with its singular values brought to 0.7 to 1.2, in bfloat16: five Newton-Schulz iterations."""
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
    """Groups as AdamW takes them; `names` are those of the parameters, in the order of the groups.

    A matrix [m, n] moves by 0.2 sqrt(max(m, n)) times the learning rate, in the root mean square as far as AdamW moves
    it (Liu et al. 2025, arXiv 2502.16982), so both take the same rate and the same weight decay.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, names: Sequence[str], **adam: Any) -> None:
        super().__init__([dict(group) for group in groups], **adam)
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        named = zip(names, every, strict=True)
        self._matrices = {id(parameter) for name, parameter in named if is_hidden_matrix(name, parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._matrices and parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        with self._without_matrices():
            super().step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        direction = orthogonal(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's look ahead
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        reach = group["lr"] * 0.2 * math.sqrt(max(direction.shape))
        parameter.add_(direction.to(parameter.dtype).reshape(parameter.shape), alpha=-reach)

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
