"""Moving averages (EMA) of the trained weights, by diffusers' EMAModel."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from sdcli.training.settings import TrainSettings


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def average_of(network: nn.Module) -> nn.Module:
    """A copy of the network for its moving average, sharing the frozen parameters."""
    shared: dict[int, Any] = {id(p): p for p in network.parameters() if not p.requires_grad}
    return copy.deepcopy(network, shared)


def moving_average(average: nn.Module, settings: TrainSettings) -> Any:
    """diffusers' EMAModel, working directly on the copy's parameters."""
    from diffusers.training_utils import EMAModel

    parameters = trained_parameters(average)
    ema = EMAModel(
        parameters, decay=settings.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=settings.ema_power, foreach=True
    )
    for parameter in parameters:
        parameter.requires_grad_(False)
    ema.shadow_params = parameters
    return ema
