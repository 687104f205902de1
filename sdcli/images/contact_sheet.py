"""Contact sheets: a grid of images on white with a label under each, as a PNG that records what is on it.

A label that no font here can draw becomes a number; the labels behind the numbers are a text file beside the sheet.
"""

from __future__ import annotations

import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin

from sdcli.errors import UsageError
from sdcli.images.formats import MAX_PIXELS
from sdcli.images.label_fonts import JOINERS, LabelFont, breaks_before, has_extra_fonts, label_font, numbered
from sdcli.io.files import check_new, write_whole

KEY = "sdcli-sheet"
"""The key of the text chunk in a sheet's PNG."""
GAP = 8
"""Pixels around and between the cells."""
LINE_HEIGHT = 15
LABEL_WIDTH = 96
"""The least width of a cell with a label, in pixels."""
UNREADABLE = "sdcli-unreadable-labels"
"""The key in a sheet's `info` of the labels that are numbers on it: {number, from 1: label}."""


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
    they are wrapped into `label_lines` lines and cut. A label that cannot be drawn is shown as its number, [3].
    `enlarge` draws each pixel as a square of that many per side.
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
    readable, unreadable = numbered([_clean(label) for label in labels or ()])
    fonts = [label_font(label) or LabelFont() for label in readable]
    wrapped = [_wrapped(label, font, width, label_lines) for label, font in zip(readable, fonts, strict=True)]
    below = max((len(lines) for lines in wrapped), default=0) * LINE_HEIGHT
    across, down = width + GAP, height + below + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + rows * down), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(shown):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for line, text in enumerate(wrapped[number] if wrapped else ()):
            middle = left + (width - fonts[number].getlength(text)) / 2
            fonts[number].draw(draw, (middle, top + height + line * LINE_HEIGHT), text)
    if unreadable:
        sheet.info[UNREADABLE] = unreadable
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


def write_sheet(
    path: Path, sheet: Image.Image, settings: Mapping[str, Any], *, overwrite: bool = False
) -> tuple[Path, ...]:
    """Write `sheet_bytes` as a whole file, and its unreadable labels, if there are any, as `NAME.labels.txt`.

    Returns the text file, if there is one. Raises AlreadyExists and CannotWrite.
    """
    unreadable = sheet.info.get(UNREADABLE, {})
    beside = (path.with_suffix(".labels.txt"),) if unreadable else ()
    for text in beside:
        check_new(text, overwrite=overwrite)
    write_whole(path, sheet_bytes(sheet, settings), overwrite=overwrite)
    for text in beside:
        lines = [f"[{number}] {label}\n" for number, label in unreadable.items()]
        write_whole(text, "".join(lines).encode(errors="backslashreplace"), overwrite=overwrite)
    return beside


def about_labels(beside: Sequence[Path]) -> str:
    """The sentence about the text file that `write_sheet` returned."""
    more = "" if has_extra_fonts() else ", which pip install 'sdcli[fonts]' brings"
    return f"no font here has all letters of the labels{more}; the numbers on the sheet are explained in {beside[0]}"


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


def _clean(label: str) -> str:
    """A label without control characters and undecodable bytes; its line breaks stay."""
    text = unicodedata.normalize("NFC", label).encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() or letter in f"\n{JOINERS}" else " " for letter in text)


def _wrapped(text: str, font: LabelFont, width: int, most: int) -> list[str]:
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


def _broken(text: str, font: LabelFont, width: int, most: int) -> list[str]:
    """The lines of a text without line breaks; stops once there are more than `most`."""
    lines: list[str] = []
    line = ""
    for word in text.split():
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


def _fitting(word: str, font: LabelFont, width: int) -> int:
    """The number of a word's first letters that fit, at least one."""
    if font.getlength(word[:width]) <= width and len(word) <= width:
        return len(word)
    fitting = 1
    while fitting < min(len(word), width) and font.getlength(word[: fitting + 1]) <= width:
        fitting += 1
    whole = fitting
    while whole > 1 and not breaks_before(word[whole]):
        whole -= 1
    return whole if whole > 1 else fitting
