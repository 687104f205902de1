"""Reads mask images: which pixels are generated anew, by their colours or by their transparency.

The rule, for every mode (grey, palette, RGB, CMYK, with alpha or with a transparent colour):

1. A mask without transparency is generated where it is white (grey level 128 or more) and kept where it is black.
   Alpha that is the same everywhere counts as no transparency.
2. A mask with transparent parts (less than half as opaque as its most opaque pixel) is one of two things, which its
   opaque pixels tell. White strokes on transparent: generated where they are painted. A picture with an erased part,
   which is the init image or has many colours: generated where it is erased, whatever its colours.
3. Any other mask with transparent parts is refused.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sdcli.errors import UsageError
from sdcli.images.image_files import upright_rgb

NEAR_WHITE = 240
"""The least level of each channel of a white stroke; lossy WebP does not keep 255."""
MOST = 0.99
"""The share of opaque pixels that are white in a mask of white strokes."""
NEARLY_OPAQUE = 250
"""Pixels with less alpha than this are edges, whose colours say little."""
SAME_PICTURE = 8.0
"""The mean difference of levels, of 255, up to which the opaque pixels are those of the init image."""
MANY_COLOURS = 16
"""A picture has more colours than this, counted in steps of 16 levels; a grey mask cannot have more."""
REMEDY = "save it without transparency, white where to generate and black where to keep"


def mask_levels(mask: Image.Image, init: Image.Image) -> Image.Image:
    """A mask of any mode -> an RGB or L image of its size, white where to generate and black where to keep.

    `init` is the init image as RGB, of the same size. Raises BadImage for a mode without known black and white
    levels, and UsageError with a sentence that begins with "is" or "has" where transparency has no clear meaning.
    """
    alpha = alpha_of(mask)
    if alpha is None or (alpha.min() == alpha.max() and alpha.max() > 0):
        return _colours(mask)
    if not alpha.max():
        raise UsageError(f"is transparent all over; {REMEDY}")
    shown = np.rint(alpha.astype(np.float64) * (255 / int(alpha.max()))).astype(np.uint8)
    if shown.min() >= NEARLY_OPAQUE:
        return _colours(mask)
    if shown.min() >= 128:
        raise UsageError(f"has half-transparent parts, but no part that is more transparent than that; {REMEDY}")
    if _are_strokes(np.asarray(_colours(mask)), shown >= NEARLY_OPAQUE, np.asarray(init)):
        return Image.fromarray(shown)
    return Image.fromarray(255 - shown)


def alpha_of(image: Image.Image) -> np.ndarray | None:
    """The alpha of each pixel [H, W], 0 to 255; None for an image without alpha and without a transparent colour."""
    if image.mode == "La":
        return np.asarray(image.convert("LA"))[..., 1]
    if image.mode.startswith("I") and "transparency" in image.info:  # Pillow does not apply the colour to 16 bits
        return np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    if not image.has_transparency_data:
        return None
    return np.asarray(image.convert("RGBA"))[..., 3]


def _colours(image: Image.Image) -> Image.Image:
    """The colours as RGB, also those of transparent pixels."""
    if image.mode == "La":
        return image.convert("LA").convert("L").convert("RGB")
    if image.has_transparency_data and not image.mode.startswith("I"):
        return image.convert("RGBA").convert("RGB")
    return upright_rgb(image)


def _are_strokes(colours: np.ndarray, opaque: np.ndarray, init: np.ndarray) -> bool:
    """Whether a mask with transparent parts is strokes rather than an erased picture. Raises UsageError for neither.

    `colours` and `init` are [H, W, 3], `opaque` [H, W].
    """
    found = colours[opaque]
    white = float((found.min(axis=1) >= NEAR_WHITE).mean())
    same = _is_same(found, init[opaque])
    if white >= MOST:
        if same:
            raise UsageError(
                "is white on transparent where the init image is white as well, so it may be strokes to generate or "
                f"what is left of an erased picture; {REMEDY}"
            )
        return True
    colour_count = len(np.unique(found >> 4, axis=0))
    if colour_count > MANY_COLOURS or (same and colour_count > 1):
        return False
    raise UsageError(
        "has transparent parts, but is neither white strokes on transparent nor the init image with a part erased; "
        f"{REMEDY}"
    )


def _is_same(found: np.ndarray, init: np.ndarray) -> bool:
    """Whether pixels [n, 3] are those of the init image, in colour or in grey."""
    if (found == found[:, :1]).all():
        grey = np.asarray(Image.fromarray(init[None]).convert("L"))[0, :, None]
        return bool(min(_distance(found, init), _distance(found, grey)) <= SAME_PICTURE)
    return _distance(found, init) <= SAME_PICTURE


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())
