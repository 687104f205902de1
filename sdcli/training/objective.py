"""The training objective of denoisers: prediction targets, the weighted loss, and the noise and timesteps of samples.

The functions take x [B, ...] and t int64 [B], and compute in float32; alpha-bar is that of `diffusion.noise_schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from sdcli.diffusion.noise_schedule import NoiseSchedule, Schedule
from sdcli.io import rng


def target(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect network predicts: the noise (Ho et al. 2020), x_0, the velocity of flow matching noise - x_0, or
    v = sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (Salimans & Ho 2022, appendix D)."""
    match schedule.prediction_type:
        case "epsilon":
            return noise.float()
        case "sample":
            return x0.float()
        case "velocity":
            return noise.float() - x0.float()
        case _:
            signal, amount = schedule.signal_and_noise(t, x0)
            return signal * noise.float() - amount * x0.float()


# The loss


def diffusion_loss(output: Tensor, expected: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample, float32 [B]; with weights 1 this is L_simple (Ho et al. 2020, eq. 14)."""
    error = (output.float() - expected.float()).square().flatten(1).mean(dim=1)
    return error if weights is None else error * weights


def snr(schedule: NoiseSchedule) -> Tensor:
    """The signal-to-noise ratio alpha-bar / (1 - alpha-bar) of each timestep, float32 [T]."""
    return schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)


def snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """min-SNR-gamma weights [B]; Hang et al. 2023, arXiv 2303.09556, section 3.4.

    The weight of the error in x_0 is min(SNR, gamma); an error in epsilon is 1 / SNR of that, one in v 1 / (SNR + 1).
    Where no signal is left (SNR 0) the weight is the limit: 1 for epsilon, 0 for x_0 and v, so these learn almost
    nothing at the noisiest timesteps. diffusers' train_text_to_image uses the same weights, but gets NaN for epsilon at
    SNR 0. Its older versions, and scripts copied from them, use min(SNR, gamma) / SNR + 1 for v (NaN at SNR 0, and
    hardly below 1 anywhere) or min(SNR + 1, gamma) / (SNR + 1), which is 1 at SNR 0.
    """
    ratio = snr(schedule).to(t.device)[t]
    match schedule.prediction_type:
        case "epsilon":
            return (gamma / ratio).clamp(max=1)  # min(SNR, gamma) / SNR, but 1 and not 0 / 0 at SNR 0
        case "sample":
            return ratio.clamp(max=gamma)
        case _:
            return ratio.clamp(max=gamma) / (ratio + 1)


# The random part of a sample, drawn from its number; see `rng.py`


def training_noise(seed: int, counter: int, shape: Sequence[int], *, noise_offset: float = 0.0) -> Tensor:
    """Standard normal noise of a sample [C, ...], plus `noise_offset` times one normal number per channel.

    Offset noise (Guttenberg 2023, "Diffusion with Offset Noise") lets a model learn an image's mean brightness.
    """
    noise = rng.noise(seed, counter, "noise", shape)
    if noise_offset:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        noise = noise + noise_offset * rng.noise(seed, counter, "noise offset", per_channel)
    return noise


def perturb(noise: Tensor, seed: int, counter: int, *, input_perturbation: float) -> Tensor:
    """The noise of the network's input, while the target keeps `noise`; Ning et al. 2023, arXiv 2301.11706, eq. 8."""
    return noise + input_perturbation * rng.noise(seed, counter, "input perturbation", noise.shape)


def timestep(seed: int, counter: int, levels: int) -> int:
    """A sample's timestep, uniform over 0..levels-1."""
    return rng.scalars(seed, counter, "timestep").randrange(levels)


@lru_cache(maxsize=8)
def timesteps(seed: int, step: int, count: int, levels: int) -> tuple[int, ...]:
    """The timesteps of an optimizer step's `count` samples, one in each of `count` equal strata, in random order.

    Each one is uniform over 0..levels-1; together they vary less between steps than independent ones. This is the
    low-discrepancy sampling of Kingma et al. 2021 (Variational Diffusion Models, arXiv 2107.00630, appendix I.1).
    """
    draw = rng.scalars(seed, step, "timesteps")
    offset = draw.random()
    order = list(range(count))
    draw.shuffle(order)
    return tuple(min(levels - 1, int((stratum + offset) / count * levels)) for stratum in order)
