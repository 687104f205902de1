"""The table of schedulers: our name -> the diffusers class, the settings it needs, and what other tools call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Process = Literal["diffusion", "flow"]
"""How a model was trained to generate: against the noise of diffusion, or along the straight paths of flow matching."""


TRAINED: dict[Process, str] = {"diffusion": "as a diffusion model", "flow": "with flow matching"}
"""Process -> how error messages describe it."""


@dataclass(frozen=True)
class Scheduler:
    """One row. `settings` override the model's own scheduler_config.json, and only what they must."""

    class_name: str
    summary: str
    a1111: str
    """A1111's `Sampler` value."""
    a1111_type: str | None = None
    """A1111's `Schedule type` value, where it writes one."""
    settings: dict[str, Any] = field(default_factory=dict)
    uses_eta: bool = False
    uses_scipy: bool = False
    stochastic: bool = False
    """Draws fresh noise at every step (from the image's own generator)."""
    begins_anywhere: bool = True
    """Whether diffusers' class is right from a step in the middle on; a refiner begins there."""
    process: Process = "diffusion"
    """Of the models that it samples from."""
    calls: Callable[[int], int] = lambda steps: steps
    """Steps -> how often it asks the network."""


SCHEDULERS: dict[str, Scheduler] = {
    "ddpm": Scheduler(
        "DDPMScheduler", "the ancestral sampler of the first paper; wants many steps", "DDPM", stochastic=True
    ),
    "ddim": Scheduler(
        "DDIMScheduler", "deterministic at eta 0, DDPM-like at eta 1; the reference", "DDIM", uses_eta=True
    ),
    "pndm": Scheduler(
        "PNDMScheduler",
        "pseudo linear multistep, the first SD default",
        "PLMS",
        settings={"skip_prk_steps": True},
        calls=lambda steps: steps + 1,
        begins_anywhere=False,
    ),
    "euler": Scheduler("EulerDiscreteScheduler", "simple and quick; what turbo models expect", "Euler"),
    "euler-trailing": Scheduler(
        "EulerDiscreteScheduler",
        "Euler on steps counted from the end; what Lightning models expect",
        "Euler",
        "SGM Uniform",
        settings={"timestep_spacing": "trailing"},
    ),
    "euler-a": Scheduler(
        "EulerAncestralDiscreteScheduler", "Euler with fresh noise at every step", "Euler a", stochastic=True
    ),
    "heun": Scheduler(
        "HeunDiscreteScheduler",
        "second order: better per step, two model calls each",
        "Heun",
        calls=lambda steps: 2 * steps - 1,
    ),
    "dpmpp-2m": Scheduler("DPMSolverMultistepScheduler", "second-order multistep; good in 20 to 25 steps", "DPM++ 2M"),
    "dpmpp-2m-karras": Scheduler(
        "DPMSolverMultistepScheduler",
        "the same on Karras' noise levels; the usual choice",
        "DPM++ 2M",
        "Karras",
        settings={"use_karras_sigmas": True},
    ),
    "dpmpp-2m-sde": Scheduler(
        "DPMSolverMultistepScheduler",
        "its stochastic form; livelier detail",
        "DPM++ 2M SDE",
        settings={"algorithm_type": "sde-dpmsolver++"},
        stochastic=True,
    ),
    "unipc": Scheduler("UniPCMultistepScheduler", "predictor and corrector; good in 10 to 20 steps", "UniPC"),
    "lms": Scheduler(
        "LMSDiscreteScheduler", "linear multistep on sigmas", "LMS", uses_scipy=True, begins_anywhere=False
    ),
    "lcm": Scheduler("LCMScheduler", "for latent consistency models, 1 to 8 steps", "LCM", stochastic=True),
    "flow-euler": Scheduler(
        "FlowMatchEulerDiscreteScheduler",
        "for flow matching (Stable Diffusion 3), and its only one",
        "Flow Euler",
        process="flow",
    ),
}


def schedulers_for(process: Process) -> list[str]:
    """The names of those that sample from models of a process."""
    return [name for name, row in SCHEDULERS.items() if row.process == process]


AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
"""What A1111's `Schedule type: Automatic` means, for the samplers where it does not mean evenly spaced steps."""
SCHEDULE_SUFFIXES = ("Karras", "Exponential", "SGM Uniform")
"""Schedules that stand at the end of a sampler's name in A1111's older versions."""
_A1111 = {(row.a1111.lower(), row.a1111_type and row.a1111_type.lower()): name for name, row in SCHEDULERS.items()}
_KOHYA = {
    "ddim": "ddim",
    "pndm": "pndm",
    "lms": "lms",
    "k_lms": "lms",
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler-a",
    "k_euler_a": "euler-a",
    "heun": "heun",
    "dpmsolver++": "dpmpp-2m",
}
"""kohya's names of samplers -> ours."""


def scheduler_of(sampler: str, schedule_type: str | None = None) -> str | None:
    """Our name of a sampler that is called as we, kohya or A1111 call it; None where there is none."""
    if schedule_type is None and sampler in SCHEDULERS:
        return sampler
    if schedule_type is None and sampler.lower() in _KOHYA:
        return _KOHYA[sampler.lower()]
    return scheduler_of_a1111(sampler, schedule_type)


def scheduler_of_a1111(sampler: str, schedule_type: str | None = None) -> str | None:
    """Our name of A1111's sampler; None where there is none.

    The schedule's type is beside the name, or, as older versions write it, at its end (`DPM++ 2M Karras`).
    """
    for suffix in SCHEDULE_SUFFIXES:
        if sampler.lower().endswith(f" {suffix.lower()}"):
            sampler, schedule_type = sampler[: -len(suffix) - 1], suffix
    kind = (schedule_type or "").lower()
    if kind == "automatic":
        schedule_type = next((kind for name, kind in AUTOMATIC.items() if name.lower() == sampler.lower()), None)
    elif kind in ("uniform", "normal"):
        schedule_type = None
    return _A1111.get((sampler.lower(), schedule_type and schedule_type.lower()))
