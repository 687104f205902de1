"""A scheduler's name -> the diffusers scheduler, with the model's own noise schedule and the table's settings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdcli.errors import BadWeights, first_line
from sdcli.io.lean_diffusers import full_imports, lean_imports
from sdcli.request.schedulers import SCHEDULERS

Advance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(model output, timestep, x) -> the next, less noisy x."""

_MODULES = {
    "DDPMScheduler": "diffusers.schedulers.scheduling_ddpm",
    "DDIMScheduler": "diffusers.schedulers.scheduling_ddim",
    "PNDMScheduler": "diffusers.schedulers.scheduling_pndm",
    "EulerDiscreteScheduler": "diffusers.schedulers.scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "diffusers.schedulers.scheduling_euler_ancestral_discrete",
    "HeunDiscreteScheduler": "diffusers.schedulers.scheduling_heun_discrete",
    "DPMSolverMultistepScheduler": "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "UniPCMultistepScheduler": "diffusers.schedulers.scheduling_unipc_multistep",
    "LMSDiscreteScheduler": "diffusers.schedulers.scheduling_lms_discrete",
    "LCMScheduler": "diffusers.schedulers.scheduling_lcm",
    "FlowMatchEulerDiscreteScheduler": "sdcli.diffusion.flow_match",
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a name in `schedulers.SCHEDULERS`.

    The model's scheduler_config.json describes its training (betas, prediction type, spacing); the table overrides only
    the settings that the sampler itself needs. Raises BadWeights for a configuration that diffusers refuses.
    """
    entry = SCHEDULERS[name]
    with full_imports() if entry.uses_scipy else lean_imports():
        module = importlib.import_module(_MODULES[entry.class_name])
    scheduler_class = getattr(module, entry.class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    # what `from_config` does, which also imports every other scheduler that could read the same configuration
    chosen = {name: value for name, value in {**config, **entry.settings}.items() if name in known}
    try:
        return scheduler_class(**chosen)
    except (TypeError, ValueError, RuntimeError, ImportError, ArithmeticError) as error:
        raise BadWeights(
            f"the model's scheduler_config.json describes no noise schedule: {first_line(error)}"
        ) from None


def advance_with(scheduler: Any, generators: Sequence[torch.Generator], *, eta: float) -> Advance:
    """The scheduler's step as a function; fresh noise comes from each image's own CPU generator, in float32."""
    accepted = inspect.signature(scheduler.step).parameters
    extras = {"generator": list(generators), "eta": eta}
    extras = {name: value for name, value in extras.items() if name in accepted}

    def advance(output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(output, t, x, return_dict=False, **extras)[0]

    return advance
