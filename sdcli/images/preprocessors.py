"""Images -> the control maps of ControlNets: edges, strokes, blurs, colours, depth. None of them needs a network.

Lines are white on black, as for the ControlNets of Zhang et al. 2023 (arXiv 2302.05543). Lengths are shares of the
shorter side, so that maps are alike at any size, except for edges, which are one pixel thin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from sdcli.images.pixels import fit
from sdcli.request.fields import Preprocessor

Levels = np.ndarray
"""Grey levels [H, W], float64 in 0..1."""

LOW, HIGH = 0.1, 0.2
"""Canny's thresholds, as shares of the steepest possible slope."""
BLOCKS = 8
"""Blocks of the palette along the shorter side: 64 pixels each at 512, as T2I-Adapter's colour maps have."""


def control_map(image: Image.Image, preprocessor: Preprocessor, size: tuple[int, int] | None) -> Image.Image:
    """An RGB image -> the RGB map that a ControlNet sees, from its middle, at `size` (width, height).

    Without a size, at the image's own, cropped to multiples of 8. Raises BadImage for a smaller image.
    """
    return PREPROCESSORS[preprocessor](fit(image, size))


def canny(image: Image.Image) -> Image.Image:
    """Thin white edges on black; Canny 1986, "A Computational Approach to Edge Detection"."""
    return _grey(_edges(_levels(image), sigma=1.0))


def scribble(image: Image.Image) -> Image.Image:
    """Thick white strokes on black, along the edges of large shapes only."""
    side = min(image.size)
    edges = _edges(_levels(image), sigma=max(1.0, side / 170))
    return _grey(ndimage.gaussian_filter(edges, max(0.6, side / 256)) > 0.15)


def softedge(image: Image.Image) -> Image.Image:
    """Soft edges, brighter where the image changes more: the largest slope over three scales, for each pixel."""
    levels = _levels(image)
    slopes = [_slope(ndimage.gaussian_filter(levels, sigma))[0] * sigma**0.5 for sigma in (1.0, 2.0, 4.0)]
    soft = np.max(slopes, axis=0)
    return _grey(np.sqrt(_stretched(soft, lowest=0.0)))


def blur(image: Image.Image) -> Image.Image:
    """The image blurred by a Gaussian of a 32nd of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 32))


def tile(image: Image.Image) -> Image.Image:
    """The image reduced to an eighth per side and enlarged again, for a tile model to add detail to."""
    small = image.resize(_shrunk(image, 8), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def palette(image: Image.Image) -> Image.Image:
    """Blocks of the image's mean colour there."""
    blocks = image.resize(_shrunk(image, min(image.size) / BLOCKS), Image.Resampling.BOX)
    return blocks.resize(image.size, Image.Resampling.NEAREST)


def depth(image: Image.Image) -> Image.Image:
    """A given depth map, near parts bright, stretched over all grey levels; a constant map becomes black."""
    return _grey(_stretched(_levels(image)))


PREPROCESSORS: Mapping[Preprocessor, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "canny": canny,
    "scribble": scribble,
    "softedge": softedge,
    "blur": blur,
    "tile": tile,
    "palette": palette,
    "depth": depth,
}


def _edges(levels: Levels, *, sigma: float) -> np.ndarray:
    """[H, W], 1 on edges one pixel thin: crests of the slope that are steep, or connected to steep ones."""
    slope, down, right = _slope(ndimage.gaussian_filter(levels, sigma))
    crests = sigma * slope * _is_crest(slope, down, right)  # blurring a step lowers its slope by the factor sigma
    groups, count = ndimage.label(crests > LOW, structure=np.ones((3, 3)))
    steep = np.zeros(count + 1, bool)
    steep[groups[crests > HIGH]] = True
    steep[0] = False
    return steep[groups].astype(np.float64)


def _slope(levels: Levels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The length of the gradient and its two components; 1 is a step from black to white."""
    down, right = (ndimage.sobel(levels, axis=axis) / 4 for axis in (0, 1))
    return np.hypot(down, right), down, right


def _is_crest(slope: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where the slope is a maximum across the edge, in the nearest of four directions."""
    octant = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(slope, 1)
    height, width = slope.shape
    crest = np.zeros(slope.shape, bool)
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        crest |= (octant == number) & (slope >= behind) & (slope > ahead)  # of two equal neighbours, the later
    return crest


def _stretched(levels: np.ndarray, *, lowest: float | None = None) -> Levels:
    low = float(levels.min()) if lowest is None else lowest
    span = float(levels.max()) - low
    return (levels - low) / span if span > 1e-6 else np.zeros_like(levels)


def _shrunk(image: Image.Image, factor: float) -> tuple[int, int]:
    width, height = (max(1, round(side / factor)) for side in image.size)
    return width, height


def _levels(image: Image.Image) -> Levels:
    return np.asarray(image.convert("L"), dtype=np.float64) / 255


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray((levels * 255).round().astype(np.uint8)).convert("RGB")
