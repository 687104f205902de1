"""torch.compile for training, used only if its gradients are correct.

torch 2.13's compiled backward pass returned exact zeros for most layers on a CPU (bfloat16 autocast, channels_last)
although the loss was correct. So the first micro-batch is computed both ways, and networks whose gradients differ stay
uncompiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdcli.training.task import Batch, Networks, OptimizerPhase

TOLERANCE = 0.05
"""Largest relative difference of a parameter's gradient, by norm; half precision alone gives about 0.01."""


def compile_if_correct(networks: Networks, phase: OptimizerPhase, batch: Batch) -> tuple[Networks, str | None]:
    """The compiled networks and None, or the uncompiled ones and the reason as a sentence."""
    plain = _gradients(networks, phase, batch)
    try:
        compiled = {name: torch.compile(network) for name, network in networks.items()}
        other = _gradients(compiled, phase, batch)  # type: ignore[arg-type]
    except Exception as error:  # compilers fail in many ways; training without one always works
        first_line = next(iter(str(error).splitlines()), "no reason given")[:200]
        return networks, f"--compile is off: compiling failed ({type(error).__name__}: {first_line})"
    floor = max(float(gradient.norm()) for gradient in plain.values()) * 1e-3
    differences = {name: difference(plain[name], other[name], floor=floor) for name in plain}
    wrong = [name for name, found in differences.items() if not found <= TOLERANCE]  # NaN is wrong too
    if wrong:
        return networks, (
            f"--compile is off: the compiled gradients of {len(wrong)} of {len(plain)} parameters differ from the "
            f"uncompiled ones, first {wrong[0]} (by {differences[wrong[0]]:.0%})"
        )
    return compiled, None  # type: ignore[return-value]


def difference(correct: Tensor, other: Tensor, *, floor: float) -> float:
    """Norm of the difference relative to the norm of the correct gradient, or to `floor` if that is larger.

    Some gradients are zero in exact arithmetic (of the keys' bias in attention) and consist of rounding errors.
    """
    return float((other - correct).norm()) / max(float(correct.norm()), floor, torch.finfo(torch.float32).tiny)


def _gradients(networks: Networks, phase: OptimizerPhase, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every parameter of the phase; the parameters have none afterwards."""
    named = {f"{group['name']}.{name}": p for group in phase.groups for name, p in group["params"].items()}
    torch.manual_seed(0)
    try:
        phase.loss(networks, batch).loss.backward()
        return {
            name: p.grad.float().clone() if p.grad is not None else torch.zeros_like(p) for name, p in named.items()
        }
    finally:
        for parameter in named.values():
            parameter.grad = None
