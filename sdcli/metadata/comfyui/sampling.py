"""The settings of a ComfyUI sampler: steps, seed, guidance and schedule, from it or the nodes that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sdcli.metadata.comfyui.graph import Graph, Node
from sdcli.metadata.comfyui.reading import Reading

SCHEDULERS = {
    ("ddpm", "normal"): "ddpm",
    ("ddim", "normal"): "ddim",
    ("ddim", "ddim_uniform"): "ddim",
    ("euler", "normal"): "euler",
    ("euler", "sgm_uniform"): "euler-trailing",
    ("euler_ancestral", "normal"): "euler-a",
    ("heun", "normal"): "heun",
    ("dpmpp_2m", "normal"): "dpmpp-2m",
    ("dpmpp_2m", "karras"): "dpmpp-2m-karras",
    ("dpmpp_2m_sde", "normal"): "dpmpp-2m-sde",
    ("dpmpp_2m_sde_gpu", "normal"): "dpmpp-2m-sde",
    ("uni_pc", "normal"): "unipc",
    ("lms", "normal"): "lms",
    ("lcm", "normal"): "lcm",
    ("lcm", "sgm_uniform"): "lcm",
}
"""ComfyUI's `sampler_name` and `scheduler` -> the scheduler of sdcli."""


def take_scheduler(found: dict[str, Any], unmapped: dict[str, Any]) -> None:
    """Take `sampler` and `scheduler`, ComfyUI's names in another tool's record, out of `unmapped` if they map."""
    scheduler = SCHEDULERS.get((str(unmapped.get("sampler")), str(unmapped.get("scheduler"))))
    if scheduler is not None:
        found["scheduler"] = scheduler
        del unmapped["sampler"], unmapped["scheduler"]


FLOW_SCHEDULERS = {("euler", "normal"): "flow-euler"}
"""The same for models that were trained with flow matching."""

FLOW_NODES = frozenset(
    {
        "EmptySD3LatentImage", "ModelSamplingSD3", "ModelSamplingFlux", "ModelSamplingAuraFlow", "FluxGuidance",
        "CLIPTextEncodeSD3", "CLIPTextEncodeFlux", "TripleCLIPLoader",
    }
)  # fmt: skip
"""Nodes that go with models of flow matching."""

Table = dict[str, tuple[str, dict[str, Any]]]

_SAMPLERS: Table = {
    "SamplerEulerAncestral": ("euler_ancestral", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerLMS": ("lms", {"order": 4}),
    "SamplerDPMPP_2M_SDE": ("dpmpp_2m_sde", {"solver_type": "midpoint", "eta": 1.0, "s_noise": 1.0}),
}
"""Nodes that make one sampler, and the settings with which they are the one of that name."""

_SIGMAS: Table = {
    "KarrasScheduler": ("karras", {"sigma_max": 14.614642, "sigma_min": 0.0291675, "rho": 7.0}),
}
"""Nodes that make a schedule, and the settings with which they are the one of that name for Stable Diffusion."""

_COUNTED = frozenset(
    {
        "BasicScheduler", "KarrasScheduler", "ExponentialScheduler", "PolyexponentialScheduler", "LaplaceScheduler",
        "BetaSamplingScheduler", "VPScheduler", "SDTurboScheduler", "AlignYourStepsScheduler", "GITSScheduler",
        "OptimalStepsScheduler",
    }
)  # fmt: skip
"""Nodes whose `steps` are those of the sampler."""


@dataclass(frozen=True)
class Sampler:
    """A sampler with the nodes that hold its settings; None where there is no such node."""

    node: Node
    settings: Node | None
    """Holds cfg, positive, negative and model: the sampler itself, or its guider."""
    noise: Node | None
    """Holds the seed."""
    sampler: Node | None
    sigmas: Node | None
    """The schedule: holds steps, scheduler and denoise."""

    @property
    def seed_name(self) -> str:
        return "noise_seed" if self.noise is not None and "noise_seed" in self.noise.inputs else "seed"


def sampler_of(graph: Graph, node: Node) -> Sampler:
    """A sampler node with those that hold its settings."""

    def behind(name: str) -> Node | None:
        output = graph.source(node, name)
        return output.node if output is not None else None

    if node.kind == "SamplerCustom":
        return Sampler(node, node, node, behind("sampler"), behind("sigmas"))
    if node.kind == "SamplerCustomAdvanced":
        return Sampler(node, behind("guider"), behind("noise"), behind("sampler"), behind("sigmas"))
    return Sampler(node, node, node, node, node)


def is_full(reading: Reading, node: Node) -> bool:
    """Whether a sampler begins with pure noise and nothing is left of its latent, but for the size."""
    sampler = sampler_of(reading.graph, node)
    if reading.peek(node, "add_noise", True) in ("disable", False):
        return False
    if "start_at_step" in node.inputs and reading.peek(node, "start_at_step") != 0:
        return False
    if sampler.noise is None or sampler.noise.kind == "DisableNoise" or sampler.sigmas is None:
        return False
    if sampler.sigmas is not node and sampler.sigmas.kind not in _COUNTED:
        return False
    denoise = reading.peek(sampler.sigmas, "denoise", None if "denoise" in sampler.sigmas.inputs else 1)
    return isinstance(denoise, int | float) and denoise > 0.9999


def read_sampling(reading: Reading, sampler: Sampler, *, flow: bool) -> None:
    """Take over seed, steps, guidance and scheduler of a sampler, and name what else it has."""
    _seed(reading, sampler)
    _guidance(reading, sampler)
    names = _schedule(reading, sampler)
    scheduler = (FLOW_SCHEDULERS if flow else SCHEDULERS).get((str(names[0]), str(names[1])))
    if scheduler is not None:
        reading.found["scheduler"] = scheduler
    else:
        for name, value in zip(("sampler_name", "scheduler"), names, strict=True):
            if value is not None:
                reading.unmapped[name] = value
    _part_of_the_steps(reading, sampler)
    rest_of(reading, sampler.node)


def rest_of(reading: Reading, node: Node) -> None:
    """Name the inputs of the main sampler that are not taken over by their own names."""
    reading.understand(node)
    left = reading.rest([node])
    for inputs in left.values():
        reading.ignore(node, *node.inputs)
        reading.unmapped |= {name: value for name, value in inputs.items() if name not in reading.unmapped}


def _seed(reading: Reading, sampler: Sampler) -> None:
    if sampler.noise is None:
        reading.unmapped["seed"] = "not known: its noise is from a node that is missing"
        return
    if sampler.seed_name not in sampler.noise.inputs:
        return
    seed = reading.given(sampler.noise, sampler.seed_name)
    if seed is not None:
        reading.found["seed"] = seed
        if sampler.noise.kind == "RandomNoise":
            reading.understand(sampler.noise)
    reading.settle(sampler.node, {"add_noise": "enable"})
    reading.settle(sampler.node, {"add_noise": True})


def _guidance(reading: Reading, sampler: Sampler) -> None:
    settings = sampler.settings
    if settings is None:
        reading.unmapped["guider"] = "not known: it is from a node that is missing"
    elif settings.kind == "BasicGuider":
        reading.found["guidance_scale"] = 1.0
        reading.understand(settings)
    elif "cfg" in settings.inputs:
        reading.found["guidance_scale"] = reading.given(settings, "cfg")
        if settings.kind == "CFGGuider":
            reading.understand(settings)


def _schedule(reading: Reading, sampler: Sampler) -> tuple[Any, Any]:
    """ComfyUI's names of the sampler and of the scheduler, None where unknown. Takes over the steps."""
    names: list[Any] = [None, None]
    parts = [(sampler.sampler, "sampler_name", _SAMPLERS), (sampler.sigmas, "scheduler", _SIGMAS)]
    for place, (node, name, table) in enumerate(parts):
        if node is None:
            reading.unmapped[name] = "not known: it is from a node that is missing"
        elif node.kind in table:
            own, usual = table[node.kind]
            if all(_near(reading.peek(node, key), value) for key, value in usual.items()):
                names[place] = own
                reading.settle(node, usual)
                reading.ignore(node, "noise_device")
                reading.understand(node)
        elif name in node.inputs and (node is sampler.node or node.kind in ("KSamplerSelect", "BasicScheduler")):
            names[place] = reading.given(node, name)
            reading.understand(node)
    sigmas = sampler.sigmas
    if sigmas is not None and "steps" in sigmas.inputs and (sigmas is sampler.node or sigmas.kind in _COUNTED):
        reading.found["steps"] = reading.given(sigmas, "steps")
        if "denoise" in sigmas.inputs:
            reading.settle(sigmas, {"denoise": 1.0})
            denoise = reading.given(sigmas, "denoise")
            if denoise is not None and denoise != 1:
                reading.unmapped["denoise"] = denoise
    return names[0], names[1]


def _near(value: Any, usual: Any) -> bool:
    if isinstance(usual, str) or not isinstance(value, int | float):
        return bool(value == usual)
    return math.isclose(value, usual, rel_tol=1e-4)


def _part_of_the_steps(reading: Reading, sampler: Sampler) -> None:
    """Ignore the bounds of KSamplerAdvanced where they contain all steps."""
    node = sampler.node
    reading.settle(node, {"start_at_step": 0})
    end, steps = reading.peek(node, "end_at_step"), reading.found.get("steps")
    if isinstance(end, int) and isinstance(steps, int) and end >= steps:
        reading.settle(node, {"end_at_step": end})
        reading.ignore(node, "return_with_leftover_noise")
    else:
        reading.settle(node, {"return_with_leftover_noise": "disable"})


def guided_by(sampler: Sampler, role: str) -> Any:
    """The link to the conditioning of a sampler: `positive` or `negative`. None where there is none."""
    settings = sampler.settings
    if settings is None:
        return None
    name = "conditioning" if settings.kind == "BasicGuider" and role == "positive" else role
    return settings.inputs.get(name)
