"""torch.compile for training, used only where its gradients are right.

torch 2.13's compiled backward returned exact zeros for most layers on a CPU (bfloat16 autocast, channels_last) while
the loss was right; so the first micro-batch is computed both ways, and a network whose gradients differ stays plain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdcli.training.task import Batch, Networks, Phase

TOLERANCE = 0.05
"""Largest relative difference of a parameter's gradient, by norm; half precision differs by about 0.01."""


def compiled_if_right(networks: Networks, phase: Phase, batch: Batch) -> tuple[Networks, str | None]:
    """The compiled networks and None, or the plain ones and the sentence that says why."""
    compiled = {name: torch.compile(network) for name, network in networks.items()}
    plain = _gradients(networks, phase, batch)
    try:
        other = _gradients(compiled, phase, batch)  # type: ignore[arg-type]
    except Exception as error:  # a compiler fails in its own ways; training plainly is always right
        return (
            networks,
            f"--compile is off: compiling failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
        )
    wrong = [name for name in plain if difference(plain[name], other[name]) > TOLERANCE]
    if wrong:
        return networks, (
            f"--compile is off: the compiled gradients of {len(wrong)} of {len(plain)} parameters differ from the "
            f"plain ones, first {wrong[0]} (by {difference(plain[wrong[0]], other[wrong[0]]):.0%})"
        )
    return compiled, None  # type: ignore[return-value]


def difference(right: Tensor, other: Tensor) -> float:
    """Norm of the difference relative to the norm of the right gradient; 0 where both are 0."""
    norm = float(right.norm())
    return float((other - right).norm()) / norm if norm else float(other.norm() > 0)


def _gradients(networks: Networks, phase: Phase, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every parameter of the phase; leaves none behind."""
    named = {f"{group['name']}.{name}": p for group in phase.groups for name, p in group["params"].items()}
    torch.manual_seed(0)
    phase.loss(networks, batch).loss.backward()
    gradients = {
        name: p.grad.float().clone() if p.grad is not None else torch.zeros_like(p) for name, p in named.items()
    }
    for parameter in named.values():
        parameter.grad = None
    return gradients
