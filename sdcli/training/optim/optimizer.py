"""The optimizer and the learning rate schedule that the settings name, from torch, diffusers and `muon.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sdcli.errors import UsageError
from sdcli.training.optim.muon import MuonWithAdamW
from sdcli.training.settings import TrainSettings


def make_optimizer(groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer over a phase's parameter groups (`task.Phase.groups`). Raises UsageError."""
    named = [
        {"params": list(group["params"].values()), "lr": group["lr"], "initial_lr": group["lr"]} for group in groups
    ]
    adam: dict[str, Any] = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(named, fused=_has_fused(named), **adam)
        case "adamw-8bit":
            try:
                import bitsandbytes  # type: ignore[import-not-found]
            except ImportError:
                raise UsageError("--optimizer adamw-8bit needs the package: pip install bitsandbytes") from None
            return bitsandbytes.optim.AdamW8bit(named, **adam)
        case "muon":
            return MuonWithAdamW(named, names=parameter_names(groups), **adam)
        case "sgd":
            return torch.optim.SGD(named, momentum=settings.adam_beta1, weight_decay=settings.adam_weight_decay)


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each parameter, in the optimizer's order."""
    return [f"{group['name']}.{name}" for group in groups for name in group["params"]]


def learning_rate(settings: TrainSettings, steps: int | None) -> Callable[[int], float]:
    """A function from the step to the factor of the learning rates, 0..1, with the schedules of diffusers' trainers.

    It is taken from `diffusers.optimization.get_scheduler` and depends on the step only, so it has no state to save.
    """
    from diffusers.optimization import get_scheduler

    scheduler = get_scheduler(
        settings.lr_scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.lr_num_cycles or 1,
    )
    function: Callable[[int], float] = scheduler.lr_lambdas[0]
    return function


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's learning rate to its initial one times the multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def _has_fused(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch has a fused AdamW for the parameters' devices."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in {"cpu", "cuda", "mps", "xpu"} for p in parameters)
