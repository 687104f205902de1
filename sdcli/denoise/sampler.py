"""A scheduler's name -> the diffusers scheduler, with the model's own noise schedule and the table's settings."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdcli.lean_imports import lean_imports
from sdcli.schedulers import SCHEDULERS

Advance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(model output, timestep, x) -> the next, less noisy x."""

_MODULES = {
    "DDPMScheduler": "scheduling_ddpm",
    "DDIMScheduler": "scheduling_ddim",
    "PNDMScheduler": "scheduling_pndm",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
    "HeunDiscreteScheduler": "scheduling_heun_discrete",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "UniPCMultistepScheduler": "scheduling_unipc_multistep",
    "LMSDiscreteScheduler": "scheduling_lms_discrete",
    "LCMScheduler": "scheduling_lcm",
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a name in `schedulers.SCHEDULERS`.

    The model's scheduler_config.json says how it was trained (betas, prediction type, spacing); the table overrides
    only what the sampler itself needs.
    """
    entry = SCHEDULERS[name]
    with contextlib.nullcontext() if entry.uses_scipy else lean_imports():
        module = importlib.import_module(f"diffusers.schedulers.{_MODULES[entry.class_name]}")
    scheduler_class = getattr(module, entry.class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    # what `from_config` does, which also imports every other scheduler that could read the same configuration
    return scheduler_class(**{name: value for name, value in {**config, **entry.settings}.items() if name in known})


def advance_with(scheduler: Any, generators: Sequence[torch.Generator], *, eta: float) -> Advance:
    """The scheduler's step as a function; fresh noise comes from each picture's own CPU generator, in float32."""
    accepted = inspect.signature(scheduler.step).parameters
    extras = {"generator": list(generators), "eta": eta}
    extras = {name: value for name, value in extras.items() if name in accepted}

    def advance(output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(output, t, x, return_dict=False, **extras)[0]

    return advance
