"""What the loop starts from, as the requests ask: noise, a start image with noise on it, or a first pass enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sdcli.diffusion.init_image import start_image, start_latents
from sdcli.diffusion.start import Start, from_latents, from_noise, keeping, mixed, with_channels
from sdcli.errors import BadLatents, BadOutput, UsageError
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.models.loader import LoadedModel
from sdcli.request.input_files import is_latents
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.autoencoder import generators_for, initial_noise, scaled, scaling_factor, shift_factor
from sdcli.vae.latent_space import LatentSpace, Report, Space, decode_with_fallbacks, quiet

Generators = Sequence[torch.Generator]
"""One per image."""


def check_start(space: Space, request: ResolvedRequest) -> None:
    """Raise what `start_for` would raise for the files that a resolved request begins with."""
    if is_latents(request.init_image):
        _latents(space, request, space.shape(width=request.width, height=request.height))
    elif request.init_image is not None:
        start_image(request)


def start_for(
    model: LoadedModel,
    space: Space,
    requests: Sequence[ResolvedRequest],
    *,
    scheduler: Any,
    generators: Generators,
    report: Report = quiet,
) -> Start:
    """Noise; or a start image with noise on it, of which a mask may keep a part.

    Each image's generator draws in the order of diffusers' pipelines: the sample of the VAE's distribution, the
    noise, the sample of the image without what is masked.
    `report` gets a sentence for each memory fallback. Raises UsageError, BadLatents for a start that does not fit,
    and OutOfMemory.
    """
    shared, device = requests[0], model.device
    shape = space.shape(width=shared.width, height=shared.height)
    if shared.init_image is None:
        return from_noise(_noise(requests, generators, shape).to(device), scheduler)
    assert shared.strength is not None
    if is_latents(shared.init_image):
        latents = torch.cat([_latents(space, request, shape) for request in requests]).to(device)
        noise = _noise(requests, generators, shape).to(device)
        return from_latents(latents, noise, scheduler, strength=shared.strength)
    images = [start_image(request) for request in requests]
    from_nothing = shared.masked and shared.strength == 1
    x0: Tensor | None = None
    if not (from_nothing and model.spec.kind.inpaints):
        x0 = space.encode([image.pixels for image in images], generators, report=report).to(device)
        x0 = x0.contiguous() if shared.masked else x0  # the layouts that diffusers has, whose sums round as here
    noise = _noise(requests, generators, shape).to(device)
    if from_nothing or x0 is None:
        start = from_noise(noise, scheduler)
    else:
        start = from_latents(x0, noise, scheduler, strength=shared.strength)
    if not shared.masked:
        return start
    masks = torch.stack([image.mask for image in images if image.mask is not None])
    cells = functional.interpolate(masks, size=shape[1:])
    if model.spec.kind.inpaints:
        kept = space.encode([image.without_masked for image in images], generators, report=report)
        seen = torch.cat([cells, kept], dim=1).to(device)
        return replace(start, around_network=partial(with_channels, more=seen))
    if space.draws:  # diffusers encodes the masked image here as well; the generators go on where it leaves them
        initial_noise(generators, shape)
    assert x0 is not None  # only an inpainting model does without
    keep = partial(
        keeping,
        known=x0,
        noise=noise,
        mask=cells.to(device),
        scheduler=scheduler,
        timesteps=start.timesteps,
    )
    return replace(start, around_advance=keep)


def start_enlarged(
    finished: Tensor,
    space: Space,
    request: ResolvedRequest,
    *,
    scheduler: Any,
    generators: Generators,
    report: Report = quiet,
) -> Start:
    """The second pass: finished latents [B, C, h, w], enlarged as they are or as pixels, with fresh noise on them.

    `report` hears what had to be done for memory. Raises OutOfMemory. What is no image stays NaN.
    """
    upscale = request.upscale
    assert upscale is not None
    width, height = request.final_size
    shape = space.shape(width=width, height=height)
    if upscale.how == "latent":
        x0 = functional.interpolate(finished, size=shape[1:], mode="bilinear")
    else:
        pixels = [_enlarged(space, latents, (width, height), report) for latents in finished]
        x0 = space.encode(pixels, generators, report=report).to(finished.device)
    noise = initial_noise(generators, shape).to(finished.device)
    return from_latents(x0, noise, scheduler, strength=upscale.strength)


def _enlarged(space: Space, latents: Tensor, size: tuple[int, int], report: Report) -> Tensor:
    """Latents [C, h, w] -> pixels [3, H, W] of another size; NaN, for the end to find, where they are no image."""
    try:
        pixels, notes = decode_with_fallbacks(space, latents)
    except BadOutput:
        return torch.full((3, size[1], size[0]), torch.nan)
    for note in notes:
        report(note)
    return to_pixels(from_pixels(pixels).resize(size, Image.Resampling.LANCZOS))


def _noise(requests: Sequence[ResolvedRequest], generators: Generators, shape: tuple[int, int, int]) -> Tensor:
    """Each image's noise [B, *shape], turned towards that of its variation seed as far as it asks for."""
    noise = initial_noise(generators, shape)
    strengths = [request.variation_strength or 0.0 for request in requests]
    if not any(strengths):
        return noise
    others = initial_noise(generators_for([request.variation_seed or 0 for request in requests]), shape)
    return mixed(noise, list(others), strengths)


def _latents(space: Space, request: ResolvedRequest, shape: tuple[int, int, int]) -> Tensor:
    """The start file's latents [1, C, h, w], scaled as the model takes them."""
    assert request.init_image is not None
    file = start_latents(request.init_image)
    if not isinstance(space, LatentSpace):
        raise UsageError(f"{request.init_image} holds latents, and {request.model} generates on pixels")
    if file.latents.shape[1:] != shape:
        held, wanted = ("x".join(map(str, sides)) for sides in (file.latents.shape[1:], shape))
        raise BadLatents(f"{request.init_image} holds latents of {held}; {request.model} generates on {wanted}")
    return scaled(space.vae, file.unscaled(scaling_factor(space.vae), shift_factor(space.vae)))
