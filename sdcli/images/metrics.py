"""Distances of two RGB images (levels, PSNR, SSIM), and PSNR and SSIM of pixels [B, C, H, W] in 0..1, float64 [B]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from sdcli.images.pixels import to_pixels

WINDOW = 11
"""Pixels per side of the window of SSIM."""
SIGMA = 1.5
BEST_PSNR = 100.0
"""Decibels for equal images, instead of infinity, so that a mean over images stays finite."""
BAND = 2**17
"""Windows per band: large images are measured in bands, to bound the memory."""


@dataclass(frozen=True)
class Distance:
    """The distance of two RGB images of equal size, over all channels of all pixels."""

    largest: int
    """Levels, 0..255."""
    mean: float
    """Levels, 0..255: the mean absolute difference."""
    psnr: float
    """Decibels, of a peak of 255; infinite for equal images."""


def distance(a: Image.Image, b: Image.Image) -> Distance | None:
    """The distance of two RGB images, computed from integers; None if their sizes differ."""
    if a.size != b.size:
        return None
    counts = np.array(ImageChops.difference(a, b).histogram()).reshape(3, 256).sum(axis=0)
    levels = np.arange(256)
    total = int(counts.sum())
    squared = int(counts @ levels**2) / total
    return Distance(
        largest=int(counts.nonzero()[0].max()),
        mean=int(counts @ levels) / total,
        psnr=10 * math.log10(255**2 / squared) if squared else math.inf,
    )


def similarity(a: Image.Image, b: Image.Image) -> float | None:
    """The structural similarity of two RGB images, see `ssim`; None for different sizes, or less than a window."""
    if a.size != b.size or min(a.size) < WINDOW:
        return None
    windows, total, band = a.height - WINDOW + 1, 0.0, max(1, BAND // a.width)
    for top in range(0, windows, band):
        rows = min(band, windows - top)
        box = (0, top, a.width, top + rows + WINDOW - 1)
        total += rows * float(ssim(to_pixels(a.crop(box))[None], to_pixels(b.crop(box))[None]))
    return total / windows


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in decibels, -10 log10 of the mean squared error; at most 100."""
    squared = (pixels.double() - other.double()).square().flatten(1).mean(dim=1)
    return -10 * squared.clamp(min=10 ** (-BEST_PSNR / 10)).log10()


def ssim(pixels: Tensor, other: Tensor) -> Tensor:
    """The structural similarity of each image, -1..1, 1 for equal ones; the mean over channels and windows.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861), eq. 13 and section III-C: Gaussian windows of 11x11 pixels, sigma
    1.5, only windows inside the image; K1 = 0.01, K2 = 0.03. In float64, because variances are differences of nearly
    equal numbers. Raises ValueError for images smaller than a window.
    """
    if min(pixels.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} pixels a side")
    x, y = pixels.double(), other.double()
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(dim=1)


def _windowed(x: Tensor) -> Tensor:
    """The Gaussian mean over every window inside the image, one axis after the other.

    Computed as a sum of shifted images: torch's convolution in float64 takes several times as long on a CPU.
    """
    weights = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2).square() / (2 * SIGMA**2))
    for axis in (3, 2):
        size = x.shape[axis] - WINDOW + 1
        total = torch.zeros_like(x.narrow(axis, 0, size))
        for start, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(x.narrow(axis, start, size), alpha=weight)
        x = total
    return x
