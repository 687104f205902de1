"""The diffusion objective: noise schedules, q(x_t | x_0), prediction targets, weights, and the loss.

alphas_cumprod[t] is the share of the signal's variance that is left at timestep t, 0 <= t < T; in the papers it is
alpha-bar, a product over 1..T of 1 - beta. All functions take x [B, ...] and t int64 [B] and compute in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.diffusion.x0_prediction import x0_of
from sdcli.errors import UsageError
from sdcli.io import rng

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much noise there is at each timestep, and what the network predicts."""

    alphas_cumprod: Tensor
    """float32 [T], falling, between 0 and 1"""
    prediction_type: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Of a scheduler_config.json, with the numbers of diffusers' own DDPMScheduler.

        Raises UsageError, and BadWeights for what diffusers makes nothing of.
        """
        scheduler = make_scheduler("ddpm", config)
        prediction = scheduler.config.prediction_type
        if prediction not in PREDICTIONS:
            raise UsageError(
                f"the scheduler's prediction type {prediction!r} cannot be trained ({', '.join(PREDICTIONS)})"
            )
        table = scheduler.alphas_cumprod.float()
        # written so that NaN does not pass
        if not (len(table) and table[0] < 1 and table[-1] >= 0 and (table.diff() < 0).all()):
            raise UsageError(
                "scheduler_config.json describes no noise schedule: alphas_cumprod should fall from below 1 to 0 or "
                "above, so every beta should be between 0 and 1"
            )
        return cls(table, prediction)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), float32 [B, 1, ...] to be multiplied with `like` [B, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        alpha_bar = self.alphas_cumprod.to(like.device)[t].view(shape)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def schedule_config(
    base: Mapping[str, Any],
    *,
    beta_schedule: str | None = None,
    beta_start: float | None = None,
    beta_end: float | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
) -> dict[str, Any]:
    """A model's scheduler_config.json with what was asked for changed; to be trained with and saved with the model.

    With zero terminal SNR the sampler must begin at the last timestep, so `timestep_spacing` becomes "trailing"
    (Lin et al. 2023, arXiv 2305.08891). Raises UsageError for what contradicts itself.
    """
    asked = {
        "beta_schedule": beta_schedule,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    config = {**base, **changes}
    if {"beta_schedule", "beta_start", "beta_end"} & set(changes):
        config.pop("trained_betas", None)
        if config.get("beta_schedule") == "squaredcos_cap_v2" and {"beta_start", "beta_end"} & set(changes):
            raise UsageError("--beta-start and --beta-end have no effect with --beta-schedule squaredcos_cap_v2")
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if start >= end:
            raise UsageError(f"--beta-start {start:g} should be smaller than --beta-end {end:g}")
    if config.get("rescale_betas_zero_snr"):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UsageError(
                "with zero terminal SNR the last step is pure noise, from which epsilon says nothing: "
                "add --prediction-type v_prediction"
            )
        config["timestep_spacing"] = "trailing"
    return config


# The forward process


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A draw from q(x_t | x_0) in one step: sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise; Ho et al. 2020, eq. 4."""
    signal, amount = schedule.signal_and_noise(t, x0)
    return signal * x0.float() + amount * noise.float()


# What the network predicts


def target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect network answers: the noise (Ho et al. 2020), x_0, or
    v = sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (Salimans & Ho 2022, appendix D)."""
    match schedule.prediction_type:
        case "epsilon":
            return noise.float()
        case "sample":
            return x0.float()
        case _:
            signal, amount = schedule.signal_and_noise(t, x0)
            return signal * noise.float() - amount * x0.float()


def x0_from(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The x_0 that a network's output means; for epsilon undefined (infinite) where no signal is left."""
    return x0_of(schedule.prediction_type, output, x_t, *schedule.signal_and_noise(t, x_t))


# The loss


def diffusion_loss(output: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample, float32 [B]; with weights 1 this is L_simple (Ho et al. 2020, eq. 14)."""
    error = (output.float() - wanted.float()).square().flatten(1).mean(dim=1)
    return error if weights is None else error * weights


def snr(schedule: NoiseSchedule) -> Tensor:
    """The signal-to-noise ratio alpha-bar / (1 - alpha-bar) of each timestep, float32 [T]."""
    return schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)


def snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """min-SNR-gamma weights [B]; Hang et al. 2023, arXiv 2303.09556, section 3.4.

    The weight of the error in x_0 is min(SNR, gamma); an error in epsilon is 1 / SNR of that, one in v 1 / (SNR + 1).
    Where no signal is left (SNR 0) the weight is the limit: 1 for epsilon, 0 for x_0 and v, which therefore learn
    almost nothing about the noisiest steps. diffusers' train_text_to_image has these weights, but NaN for epsilon
    there. Its older versions and scripts copied from them take min(SNR, gamma) / SNR + 1 for v, which is NaN there and
    hardly less than 1 anywhere, or min(SNR + 1, gamma) / (SNR + 1), which is 1 there.
    """
    ratio = snr(schedule).to(t.device)[t]
    match schedule.prediction_type:
        case "epsilon":
            return (gamma / ratio).clamp(max=1)  # min(SNR, gamma) / SNR, but 1 and not 0 / 0 at SNR 0
        case "sample":
            return ratio.clamp(max=gamma)
        case _:
            return ratio.clamp(max=gamma) / (ratio + 1)


# The random part of a sample; counted, see `rng.py`


def training_noise(seed: int, counter: int, shape: Sequence[int], *, noise_offset: float = 0.0) -> Tensor:
    """Standard normal noise of a sample [C, ...]; with `noise_offset` plus a normal number per channel times it.

    Offset noise (Guttenberg 2023, "Diffusion with Offset Noise") lets a model change an image's mean brightness.
    """
    noise = rng.noise(seed, counter, "noise", shape)
    if noise_offset:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        noise = noise + noise_offset * rng.noise(seed, counter, "noise offset", per_channel)
    return noise


def perturbed(noise: Tensor, seed: int, counter: int, *, input_perturbation: float) -> Tensor:
    """The noise for the network's input, while the target keeps `noise`; Ning et al. 2023, arXiv 2301.11706, eq. 8."""
    return noise + input_perturbation * rng.noise(seed, counter, "input perturbation", noise.shape)


def timestep(seed: int, counter: int, levels: int) -> int:
    """A timestep 0..levels-1 of a sample, all equally likely."""
    return rng.scalars(seed, counter, "timestep").randrange(levels)


@lru_cache(maxsize=8)
def timesteps(seed: int, step: int, count: int, levels: int) -> tuple[int, ...]:
    """The timesteps of a step's `count` samples, one in each of `count` equal strata, in random order.

    Each alone is uniform over 0..levels-1, together they vary less from step to step than independent ones: low
    discrepancy sampling of Kingma et al. 2021 (variational diffusion models, arXiv 2107.00630, appendix I.1).
    """
    draw = rng.scalars(seed, step, "timesteps")
    offset = draw.random()
    order = list(range(count))
    draw.shuffle(order)
    return tuple(min(levels - 1, int((stratum + offset) / count * levels)) for stratum in order)
