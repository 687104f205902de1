"""A cheap approximation of the image that latents decode to, to watch it while it is denoised."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sdcli.vae.latent_space import PixelSpace, Space

FEW_CELLS = 256
"""Latents of at most this many cells are decoded exactly; 16x16 cells are 128x128 pixels, the starter's 256x256."""


def latent_preview(space: Space, x: Tensor) -> Tensor:
    """x [C, h, w] -> pixels [3, H, W] in 0..1 on the CPU; of large latents one pixel per cell.

    The colour of a cell is nearly a linear function of its latent. That function is fitted by least squares to a copy
    of these latents, reduced to at most FEW_CELLS cells, and its decoded image.
    """
    _, height, width = x.shape
    if decodes_exactly(space, x):
        return space.decode(x[None])[0].nan_to_num(0)
    factor = math.ceil(math.sqrt(height * width / FEW_CELLS))
    few = (max(1, height // factor), max(1, width // factor))
    reduced = functional.adaptive_avg_pool2d(x, few)
    colours = functional.adaptive_avg_pool2d(space.decode(reduced[None])[0].nan_to_num(0), few)
    linear = torch.linalg.lstsq(_with_one(reduced), colours.flatten(1).T).solution
    return (_with_one(x) @ linear).T.unflatten(1, (height, width)).clamp(0, 1)


def decodes_exactly(space: Space, x: Tensor) -> bool:
    """Whether the preview of x [C, h, w] is its decoded image itself."""
    return isinstance(space, PixelSpace) or x.shape[1] * x.shape[2] <= FEW_CELLS


def _with_one(x: Tensor) -> Tensor:
    """x [C, h, w] -> [h w, C + 1], a row for each cell, with a constant 1 for the intercept."""
    rows = x.float().cpu().flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
