"""Where denoising starts: noise alone, or something with noise on it, part of which may be kept to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli.diffusion.predict import Predict
from sdcli.diffusion.scheduler_factory import Advance


@dataclass(frozen=True)
class Start:
    """x [B, C, h, w] as the first of `timesteps` expects it, float32."""

    x: Tensor
    timesteps: Tensor
    around_network: Callable[[Predict], Predict] = lambda predict: predict
    around_advance: Callable[[Advance], Advance] = lambda advance: advance


def from_noise(noise: Tensor, scheduler: Any) -> Start:
    """All of the timesteps, from noise alone."""
    return Start(noise * scheduler.init_noise_sigma, remaining(scheduler, 1))


def from_latents(known: Tensor, noise: Tensor, scheduler: Any, *, strength: float) -> Start:
    """The last timesteps, from x_0 = `known` with noise on it; SDEdit, Meng et al. 2021, arXiv 2108.01073.

    `strength` (0..1) is the share of the steps that are done: int(strength * steps) of them, which must not be 0.
    """
    timesteps = remaining(scheduler, strength)
    return Start(scheduler.add_noise(known, noise, timesteps[:1].repeat(len(known))), timesteps)


def remaining(scheduler: Any, strength: float) -> Tensor:
    """The last share `strength` of the scheduler's timesteps; the scheduler begins there."""
    steps = scheduler.num_inference_steps
    return from_step(scheduler, (steps - int(steps * strength)) * scheduler.order)


def from_step(scheduler: Any, first: int) -> Tensor:
    """The timesteps from number `first` on; the scheduler begins there."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def steps_before(scheduler: Any, timesteps: Tensor, part: float) -> int:
    """How many of its timesteps come before `part` (0..1) of the noise schedule is done.

    Where diffusers' pipelines split a schedule (`denoising_end`, `denoising_start`), but never within a step of Heun's
    method, which has two timesteps.
    """
    levels = scheduler.config.num_train_timesteps
    before = int((timesteps >= round(levels - part * levels)).sum())
    return before - before % int(scheduler.order)


def keeping(
    advance: Advance, known: Tensor, noise: Tensor, mask: Tensor, *, scheduler: Any, timesteps: Tensor
) -> Advance:
    """After each step, where `mask` [B, 1, h, w] is 0, x is `known` with as much of `noise` as the next step expects.

    The returned function counts the steps, so it serves one run over `timesteps`.
    """
    upcoming = iter(timesteps[1:])

    def advance_(output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        x, following = advance(output, t, x), next(upcoming, None)
        kept = known if following is None else scheduler.add_noise(known, noise, following[None])
        return (1 - mask) * kept + mask * x

    return advance_


def with_channels(predict: Predict, more: Tensor) -> Predict:
    """The network of an inpainting model, which sees mask and masked latents [B, 5, h, w] behind x's own channels."""
    return lambda x, t: predict(torch.cat([x, more.repeat(len(x) // len(more), 1, 1, 1)], dim=1), t)


def mixed(noise: Tensor, others: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Noise [B, C, h, w] turned towards another noise of each image: by 0 not at all, by 1 wholly; see `slerp`."""
    rows = zip(noise, others, strengths, strict=True)
    return torch.stack([slerp(row, other, strength) if strength else row for row, other, strength in rows])


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation, which keeps the length of noise (Shoemake 1985); `share` 0 is a, 1 is b."""
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
