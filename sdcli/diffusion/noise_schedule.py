"""Noise schedules of diffusion models: how much noise each timestep has, and the forward process q(x_t | x_0).

alphas_cumprod[t] is the share of the signal's variance that is left at timestep t, 0 <= t < T; papers call it
alpha-bar, the product of 1 - beta over the timesteps up to t. All functions take x [B, ...] and t int64 [B], and
compute in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.errors import UsageError
from sdcli.request.schedulers import Process

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise level of each timestep, and what the network predicts."""

    alphas_cumprod: Tensor
    """float32 [T], falling, between 0 and 1"""
    prediction_type: str
    settings: ClassVar[frozenset[str]] = frozenset(
        {"beta_schedule", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr", "snr_gamma"}
    )
    """The training settings that have an effect with it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a scheduler_config.json describes, as computed by diffusers' DDPMScheduler.

        Raises UsageError, and BadWeights where diffusers cannot read the configuration.
        """
        scheduler = make_scheduler("ddpm", config)
        prediction = scheduler.config.prediction_type
        if prediction not in PREDICTIONS:
            raise UsageError(f"the scheduler's prediction type {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        table = scheduler.alphas_cumprod.float()
        # written so that NaN fails the check
        if not (len(table) and table[0] < 1 and table[-1] >= 0 and (table.diff() < 0).all()):
            raise UsageError(
                "scheduler_config.json does not describe a noise schedule: alphas_cumprod must fall from below 1 to 0 "
                "or above, so every beta must be between 0 and 1"
            )
        return cls(table, prediction)

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def times(self, t: Tensor) -> Tensor:
        """The timesteps as the network takes them."""
        return t

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), float32 [B, 1, ...], broadcastable to `like` [B, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        alpha_bar = self.alphas_cumprod.to(like.device)[t].view(shape)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """The noise levels of flow matching: x_t = (1 - sigma) x_0 + sigma noise; Lipman et al. 2022, arXiv 2210.02747.

    The network predicts the velocity, noise - x_0.
    """

    sigmas: Tensor
    """float32 [T], rising to 1"""
    prediction_type: ClassVar[str] = "velocity"
    settings: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """The schedule that a scheduler_config.json describes. Raises BadWeights if diffusers cannot read it."""
        return cls(make_scheduler("flow-euler", config).sigmas.float().flip(0))

    def __len__(self) -> int:
        return len(self.sigmas)

    def times(self, t: Tensor) -> Tensor:
        """sigma times T, as the sampler gives it to the network."""
        return self.sigmas.to(t.device)[t] * len(self)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - sigma and sigma, float32 [B, 1, ...], broadcastable to `like` [B, ...]."""
        sigma = self.sigmas.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
        return 1 - sigma, sigma


Schedule = NoiseSchedule | FlowSchedule
SCHEDULES: dict[Process, type[NoiseSchedule] | type[FlowSchedule]] = {"diffusion": NoiseSchedule, "flow": FlowSchedule}


def schedule_config(
    base: Mapping[str, Any],
    *,
    beta_schedule: str | None = None,
    beta_start: float | None = None,
    beta_end: float | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
) -> dict[str, Any]:
    """A model's scheduler_config.json with the given entries replaced; training uses it and saves it with the model.

    With zero terminal SNR, sampling must start at the last timestep, so `timestep_spacing` becomes "trailing"
    (Lin et al. 2023, arXiv 2305.08891). Raises UsageError for entries that contradict each other.
    """
    given = {
        "beta_schedule": beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    config = {**base, **changes}
    if {"beta_schedule", "beta_start", "beta_end"} & set(changes):
        config.pop("trained_betas", None)
        if config.get("beta_schedule") == "squaredcos_cap_v2" and {"beta_start", "beta_end"} & set(changes):
            raise UsageError("--beta-start and --beta-end have no effect with --beta-schedule squaredcos_cap_v2")
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if start >= end:
            raise UsageError(f"--beta-start {start:g} must be smaller than --beta-end {end:g}")
    if config.get("rescale_betas_zero_snr"):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UsageError(
                "with zero terminal SNR the last timestep is pure noise, where predicting epsilon teaches nothing: "
                "add --prediction-type v_prediction"
            )
        config["timestep_spacing"] = "trailing"
    return config


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A sample of q(x_t | x_0); of diffusion sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise; Ho et al. 2020, eq. 4."""
    signal, amount = schedule.signal_and_noise(t, x0)
    return signal * x0.float() + amount * noise.float()
