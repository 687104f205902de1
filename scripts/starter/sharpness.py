"""Measure how sharp outlines are: the mean distance in pixels over which they rise from 10 to 90 % of their contrast.

    python scripts/starter/sharpness.py GENERATED REAL

compares the images of two folders, scaled to the same size; a step blurred by a Gaussian of sigma pixels has a width of
2.56 sigma. Every pixel at which the brightness changes fastest across an outline counts, if the contrast is at least a
fifth of the range from black to white. Decoded images have wide outlines where the VAE or the latents are imprecise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

REACH, PER_PIXEL = 10, 4
"""The profile across an outline: pixels to each side, and samples per pixel."""
CONTRAST = 0.2
SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of PNG files, scaled to 256x256 if they differ")
    for folder in parser.parse_args().folders:
        images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
        if not images:
            parser.error(f"no PNG files in {folder}")
        scaled = [np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in images]
        width = outline_width(torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 255)
        print(f"{folder}: {width:.2f} pixels, {len(images)} images")


def outline_width(images: Tensor) -> float:
    """The mean 10-90 % width of the outlines in images [n, 3, H, W] in 0..1, in pixels; NaN without outlines."""
    widths = [outline_widths(image) for image in images]
    return float(torch.cat(widths).mean())


def outline_widths(image: Tensor) -> Tensor:
    """The width at each point of the outlines of an image [3, H, W] in 0..1."""
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    smooth = F.avg_pool2d(F.pad(grey[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
    dy, dx = torch.gradient(smooth)
    slope = (dx.square() + dy.square()).sqrt()
    y, x = (slope > CONTRAST / (2 * REACH)).nonzero(as_tuple=True)
    inside = (y >= REACH) & (y < grey.shape[0] - REACH) & (x >= REACH) & (x < grey.shape[1] - REACH)
    y, x = y[inside], x[inside]
    along = torch.stack([dy[y, x], dx[y, x]], dim=1) / slope[y, x, None]
    ahead, behind = (_sample(slope, y[:, None] + sign * along[:, :1], x[:, None] + sign * along[:, 1:])[:, 0]
                     for sign in (1, -1))  # fmt: skip
    steepest = (slope[y, x] >= ahead) & (slope[y, x] > behind)
    y, x, along = y[steepest], x[steepest], along[steepest]
    steps = torch.arange(-REACH * PER_PIXEL, REACH * PER_PIXEL + 1) / PER_PIXEL
    profile = _sample(grey, y[:, None] + steps * along[:, :1], x[:, None] + steps * along[:, 1:])
    return _rise(profile)


def _rise(profile: Tensor) -> Tensor:
    """10-90 % widths of profiles [n, samples] that rise at their middle; those of too little contrast are left out.

    An outline ends at either side where the profile stops rising.
    """
    middle = profile.shape[1] // 2
    falls = profile.diff(dim=1) <= 1e-4
    up, down = falls[:, middle:], falls[:, :middle].flip(1)
    top = torch.where(up.any(1), up.float().argmax(1), up.shape[1])
    bottom = torch.where(down.any(1), down.float().argmax(1), down.shape[1])
    high = profile.gather(1, (middle + top)[:, None])
    low = profile.gather(1, (middle - bottom)[:, None])
    share = (profile - low) / (high - low).clamp(min=1e-6)
    place = torch.arange(profile.shape[1])
    risen = (place >= (middle - bottom)[:, None]) & (place <= (middle + top)[:, None])
    between = ((share > 0.1) & (share < 0.9) & risen).sum(1) / PER_PIXEL
    return between[(high - low)[:, 0] >= CONTRAST]


def _sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of an image [H, W] at places [n, m] in pixels."""
    grid = torch.stack([x / (image.shape[1] - 1) * 2 - 1, y / (image.shape[0] - 1) * 2 - 1], dim=-1)
    return F.grid_sample(image[None, None], grid[None], align_corners=True, padding_mode="border")[0, 0]


if __name__ == "__main__":
    main()
