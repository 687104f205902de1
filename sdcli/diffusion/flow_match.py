"""Flow matching's Euler sampler, with the methods that diffusers' diffusion schedulers have and this one lacks."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers.schedulers.scheduling_flow_match_euler_discrete as diffusers_scheduling
from torch import Tensor

from sdcli.errors import BadWeights

_UNKNOWN = ("use_beta_sigmas", "invert_sigmas")
"""Settings of other families' models: scipy's noise levels, time that runs backwards."""


class FlowMatchEulerDiscreteScheduler(diffusers_scheduling.FlowMatchEulerDiscreteScheduler):
    """x_t = (1 - sigma) x_0 + sigma noise, and the network predicts the velocity noise - x_0.

    Lipman et al. 2022 (arXiv 2210.02747); the levels are shifted as in Esser et al. 2024 (arXiv 2403.03206, section
    5.3.2), by the `shift` of the model's configuration.
    """

    init_noise_sigma: ClassVar[float] = 1.0

    def set_timesteps(self, num_inference_steps: int, device: Any = None, mu: float | None = None) -> None:
        """As diffusers'; `mu` is the shift of a model whose shift depends on the image's size (`Family.timesteps`).

        Raises BadWeights for a model whose noise levels are not known here.
        """
        for name in (*_UNKNOWN, *(("use_dynamic_shifting",) if mu is None else ())):
            if self.config[name]:
                raise BadWeights(f"the model's noise levels are not supported: scheduler_config.json sets {name}")
        super().set_timesteps(num_inference_steps, device, mu=mu)

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The network takes x unscaled."""
        return x

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of x_0 and noise [B, C, h, w] at timesteps [B]."""
        return self.scale_noise(x0, timesteps, noise)

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of signal and noise in x_t; the method has this name in diffusers' other schedulers, too."""
        return 1 - sigma, sigma
