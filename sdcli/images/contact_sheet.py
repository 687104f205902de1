"""Contact sheets: a grid of images on white with a label under each, as a PNG that records what is on it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdcli.errors import UsageError
from sdcli.images.formats import MAX_PIXELS
from sdcli.io.files import write_whole

KEY = "sdcli-sheet"
"""The key of the text chunk in a sheet's PNG."""
GAP = 8
"""Pixels around and between the cells."""
FONT_SIZE = 12
LINE_HEIGHT = 15
LABEL_WIDTH = 96
"""The least width of a cell with a label, in pixels."""

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def contact_sheet(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    label_lines: int = 2,
    enlarge: int = 1,
) -> Image.Image:
    """Images of any mode and size -> one RGB image, row by row, each centred in a cell that fits the largest.

    Without `columns` the sheet is about as wide as high. Transparent parts become white. Labels may have line breaks;
    they are wrapped into `label_lines` lines and cut. `enlarge` draws each pixel as a square of that many per side.
    Raises ValueError for no images, and for another number of labels than images.
    """
    if not images:
        raise ValueError("a contact sheet needs an image")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"there are {len(labels)} labels for {len(images)} images")
    shown = [_on_white(image, enlarge) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(shown))), len(shown))
    rows = math.ceil(len(shown) / columns)
    width = max(LABEL_WIDTH if labels else 1, *(image.width for image in shown))
    height = max(image.height for image in shown)
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [_wrapped(label, font, width, label_lines) for label in labels or ()]
    below = max((len(lines) for lines in wrapped), default=0) * LINE_HEIGHT
    across, down = width + GAP, height + below + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + rows * down), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(shown):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for line, text in enumerate(wrapped[number] if wrapped else ()):
            middle = left + (width - font.getlength(text)) / 2
            draw.text((middle, top + height + line * LINE_HEIGHT), text, fill="black", font=font)
    return sheet


def empty(size: tuple[int, int]) -> Image.Image:
    """A white image, for an empty cell."""
    return Image.new("RGB", size, "white")


def check_size(count: int, largest: tuple[int, int], *, label_lines: int = 2, enlarge: int = 1) -> None:
    """Raise UsageError if `count` images of up to `largest` (width, height) make a sheet over MAX_PIXELS."""
    width, height = (side * enlarge for side in largest)
    if count * (max(width, LABEL_WIDTH) + GAP) * (height + label_lines * LINE_HEIGHT + GAP) > MAX_PIXELS:
        raise UsageError(
            f"{count} images of up to {width}x{height} pixels are too many for one sheet of {MAX_PIXELS:,} pixels"
        )


def write_sheet(path: Path, sheet: Image.Image, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write `sheet_bytes` as a whole file. Raises AlreadyExists and CannotWrite."""
    write_whole(path, sheet_bytes(sheet, settings), overwrite=overwrite)


def sheet_bytes(sheet: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A sheet as a PNG file, with `settings` (JSON-ready, what is on it) in the text chunk `sdcli-sheet`.

    Equal arguments give equal bytes.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, json.dumps(dict(settings)))  # ASCII, so that it is a tEXt chunk, which every reader knows
    data = io.BytesIO()
    sheet.save(data, format="PNG", pnginfo=chunks)
    return data.getvalue()


def _on_white(image: Image.Image, enlarge: int) -> Image.Image:
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid)
    shown = image.convert("RGB")
    if enlarge == 1:
        return shown
    return shown.resize((shown.width * enlarge, shown.height * enlarge), Image.Resampling.NEAREST)


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """A text in at most `most` lines of at most `width` pixels; three dots at the end show that it was cut.

    Lines are broken at line breaks, between words, and inside words that are longer than a line.
    """
    lines: list[str] = []
    for part in text.split("\n"):
        lines += _broken(part, font, width, most)
        if len(lines) > most:
            break
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last.rstrip(' ,;:.')}..."]


def _broken(text: str, font: Font, width: int, most: int) -> list[str]:
    """The lines of a text without line breaks; stops once there are more than `most`."""
    lines: list[str] = []
    line = ""
    for word in "".join(letter if letter.isprintable() else " " for letter in text).split():
        if font.getlength(longer := f"{line} {word}".strip()) <= width:
            line = longer
            continue
        lines += [line] if line else []
        while (fitting := _fitting(word, font, width)) < len(word):
            lines.append(word[:fitting])
            word = word[fitting:]
            if len(lines) > most:
                break
        line = word
        if len(lines) > most:
            break
    return [*lines, line] if line else lines


def _fitting(word: str, font: Font, width: int) -> int:
    """The number of a word's first letters that fit, at least one."""
    if font.getlength(word[:width]) <= width and len(word) <= width:
        return len(word)
    fitting = 1
    while fitting < min(len(word), width) and font.getlength(word[: fitting + 1]) <= width:
        fitting += 1
    return fitting
