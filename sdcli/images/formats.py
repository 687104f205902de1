"""The image file formats that sdcli writes: names, suffixes and size limits. Imports neither torch nor Pillow."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_PIXELS = 8192 * 8192
"""Of the largest image that is generated or read."""
MAX_SIDE: dict[ImageFormat, int] = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}
"""Pixels a side that the formats, and the libraries that write them, can hold."""
SUFFIX_OF: dict[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""The suffix of new files."""
FORMAT_OF: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Every suffix, in lower case -> its format."""
