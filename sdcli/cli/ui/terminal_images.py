"""Images on a terminal: half blocks, or with textual-image kitty graphics and sixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

BELOW = 6
"""Lines of the terminal that an image leaves free."""


class HalfBlocks:
    """An image for rich, as large as the terminal allows; a cell has two pixels, as foreground and background."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image.convert("RGB")
        self._size = (0, 0)
        self._segments: list[Segment] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """The cells, computed again only if the size of the terminal changed."""
        from PIL import ImageOps

        size = (options.max_width, 2 * max(2, console.height - BELOW))
        if size != self._size:
            self._size, self._segments = size, list(_cells(ImageOps.contain(self._image, size)))
        yield from self._segments


def _cells(image: Image.Image) -> Iterator[Segment]:
    from rich.color import Color
    from rich.segment import Segment
    from rich.style import Style

    data, width = image.tobytes(), image.width
    colours = [Color.from_rgb(*data[place : place + 3]) for place in range(0, len(data), 3)]
    for top in range(0, len(colours), 2 * width):
        upper, lower = colours[top : top + width], colours[top + width : top + 2 * width]
        for column, ink in enumerate(upper):
            yield Segment("▀", Style(color=ink, bgcolor=lower[column] if lower else None))
        yield Segment.line()


def best_renderable() -> Any:
    """The rich renderable that shows images best on this terminal.

    textual-image queries the terminal through stdout, so it is used only if stdout is a terminal.
    """
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        return HalfBlocks
    try:
        from textual_image.renderable import Image, SixelImage, TGPImage
    except ImportError:
        return HalfBlocks
    return Image if Image in (SixelImage, TGPImage) else HalfBlocks
