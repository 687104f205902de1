"""The latents that denoising starts from: noise, an init image with noise on it, or an enlarged first pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sdcli.diffusion.inpainting import append_channels, keep_unmasked
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import Predict
from sdcli.diffusion.scheduler_factory import Advance
from sdcli.diffusion.timesteps import last_timesteps
from sdcli.errors import BadLatents, BadOutput, UsageError
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.request.input_files import is_latents
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.autoencoder import generators_for, initial_noise, scale, scaling_factor, shift_factor
from sdcli.vae.decode import decode_with_fallbacks
from sdcli.vae.latent_space import LatentSpace, Report, Space, quiet

Generators = Sequence[torch.Generator]
"""One per image."""


@dataclass(frozen=True)
class InitLatents:
    """x [B, C, h, w], float32, as noisy as the first of `timesteps` expects, and what wraps the steps from there."""

    x: Tensor
    timesteps: Tensor
    wrap_predict: Callable[[Predict], Predict] = lambda predict: predict
    wrap_advance: Callable[[Advance], Advance] = lambda advance: advance


def from_noise(noise: Tensor, scheduler: Any) -> InitLatents:
    """All of the timesteps, from noise alone."""
    return InitLatents(noise * scheduler.init_noise_sigma, last_timesteps(scheduler, 1))


def from_latents(x0: Tensor, noise: Tensor, scheduler: Any, *, strength: float) -> InitLatents:
    """The last timesteps, from x_0 with noise on it; SDEdit, Meng et al. 2021, arXiv 2108.01073.

    `strength` (0..1) is the share of the steps that are done: int(strength * steps) of them, which must not be 0.
    """
    timesteps = last_timesteps(scheduler, strength)
    return InitLatents(scheduler.add_noise(x0, noise, timesteps[:1].repeat(len(x0))), timesteps)


def check_init_image(pipeline: Pipeline, request: ResolvedRequest) -> None:
    """Raise what `init_latents` would raise for the files that a resolved request starts from."""
    if is_latents(request.init_image):
        _latents_of_file(pipeline, request, _shape(pipeline.space, request))
    elif request.init_image is not None:
        pipeline.inputs.init_image(request)


def init_latents(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    *,
    scheduler: Any,
    generators: Generators,
    report: Report = quiet,
) -> InitLatents:
    """Noise; or an init image with noise on it, of which a mask may keep a part.

    Each image's generator draws in the order of diffusers' pipelines: the sample of the VAE's distribution, the
    noise, the sample of the image without its masked part.
    `report` gets a sentence for each memory fallback. Raises UsageError, BadLatents for latents that do not fit, and
    OutOfMemory.
    """
    shared, model, space = requests[0], pipeline.model, pipeline.space
    shape, device = _shape(space, shared), model.device
    if shared.init_image is None:
        return from_noise(_noise(requests, generators, shape).to(device), scheduler)
    assert shared.strength is not None
    if is_latents(shared.init_image):
        latents = torch.cat([_latents_of_file(pipeline, request, shape) for request in requests]).to(device)
        noise = _noise(requests, generators, shape).to(device)
        return from_latents(latents, noise, scheduler, strength=shared.strength)
    images = [pipeline.inputs.init_image(request) for request in requests]
    from_noise_alone = shared.masked and shared.strength == 1
    x0: Tensor | None = None
    if not (from_noise_alone and model.spec.kind.inpaints):
        x0 = space.encode([image.pixels for image in images], generators, report=report).to(device)
        x0 = x0.contiguous() if shared.masked else x0  # the layouts that diffusers has, whose sums round as here
    noise = _noise(requests, generators, shape).to(device)
    if from_noise_alone or x0 is None:
        init = from_noise(noise, scheduler)
    else:
        init = from_latents(x0, noise, scheduler, strength=shared.strength)
    if not shared.masked:
        return init
    mask = functional.interpolate(
        torch.stack([image.mask for image in images if image.mask is not None]), size=shape[1:]
    )
    if model.spec.kind.inpaints:
        unmasked = space.encode([image.without_masked for image in images], generators, report=report)
        channels = torch.cat([mask, unmasked], dim=1).to(device)
        return replace(init, wrap_predict=partial(append_channels, channels=channels))
    if space.draws:  # diffusers encodes the masked image here as well; the generators continue where it leaves them
        initial_noise(generators, shape)
    assert x0 is not None  # only an inpainting model works without
    keep = partial(
        keep_unmasked,
        x0=x0,
        noise=noise,
        mask=mask.to(device),
        scheduler=scheduler,
        timesteps=init.timesteps,
    )
    return replace(init, wrap_advance=keep)


def enlarged_latents(
    finished: Tensor,
    pipeline: Pipeline,
    request: ResolvedRequest,
    *,
    scheduler: Any,
    generators: Generators,
    report: Report = quiet,
) -> InitLatents:
    """For the second pass: finished latents [B, C, h, w], enlarged as they are or as pixels, with fresh noise on them.

    `report` gets a sentence for each memory fallback. Raises OutOfMemory. Latents that give no image become NaN.
    """
    upscale, space = request.upscale, pipeline.space
    assert upscale is not None
    width, height = request.final_size
    shape = space.shape(width=width, height=height)
    if upscale.how == "latent":
        x0 = functional.interpolate(finished, size=shape[1:], mode="bilinear")
    else:
        pixels = [_enlarged_pixels(space, latents, (width, height), report) for latents in finished]
        x0 = space.encode(pixels, generators, report=report).to(finished.device)
    noise = initial_noise(generators, shape).to(finished.device)
    return from_latents(x0, noise, scheduler, strength=upscale.strength)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation, which keeps the length of noise (Shoemake 1985); `share` 0 is a, 1 is b."""
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def _enlarged_pixels(space: Space, latents: Tensor, size: tuple[int, int], report: Report) -> Tensor:
    """Latents [C, h, w] -> pixels [3, H, W] of another size; NaN where they give no image."""
    try:
        pixels, notes = decode_with_fallbacks(space, latents)
    except BadOutput:
        return torch.full((3, size[1], size[0]), torch.nan)
    for note in notes:
        report(note)
    return to_pixels(from_pixels(pixels).resize(size, Image.Resampling.LANCZOS))


def _shape(space: Space, request: ResolvedRequest) -> tuple[int, int, int]:
    return space.shape(width=request.width, height=request.height)


def _noise(requests: Sequence[ResolvedRequest], generators: Generators, shape: tuple[int, int, int]) -> Tensor:
    """Each image's noise [B, *shape], interpolated towards that of its variation seed by its variation strength."""
    noise = initial_noise(generators, shape)
    strengths = [request.variation_strength or 0.0 for request in requests]
    if not any(strengths):
        return noise
    others = initial_noise(generators_for([request.variation_seed or 0 for request in requests]), shape)
    rows = zip(noise, others, strengths, strict=True)
    return torch.stack([slerp(row, other, strength) if strength else row for row, other, strength in rows])


def _latents_of_file(pipeline: Pipeline, request: ResolvedRequest, shape: tuple[int, int, int]) -> Tensor:
    """The latents [1, C, h, w] of a request's init file, scaled as the model takes them."""
    assert request.init_image is not None
    file, space = pipeline.inputs.init_latents(request.init_image), pipeline.space
    if not isinstance(space, LatentSpace):
        raise UsageError(f"{request.init_image} holds latents, and {request.model} generates on pixels")
    if file.latents.shape[1:] != shape:
        held, wanted = ("x".join(map(str, sides)) for sides in (file.latents.shape[1:], shape))
        raise BadLatents(f"{request.init_image} holds latents of {held}; {request.model} generates on {wanted}")
    return scale(space.vae, file.unscaled(scaling_factor(space.vae), shift_factor(space.vae)))
