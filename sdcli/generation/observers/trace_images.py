"""The denoising of one image as images: a strip of chosen steps with labels, and an animation of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdcli.errors import UsageError
from sdcli.generation.settings import TraceFormat
from sdcli.images.contact_sheet import check_size, contact_sheet, sheet_bytes

STRIP_SIDE, FRAME_SIDE = 256, 512
"""Pixels of an image's longer side at most, in the strip and in the animation."""
SMALL = 64
"""Pixels a side; smaller images are enlarged towards it."""
WHOLE_MS, SLOWEST_MS, HELD_MS = 4000, 400, 2000
"""How long an animation takes, how long a frame stays at most, and how long the last one does."""
_SAVE: dict[TraceFormat, dict[str, Any]] = {
    "webp": {"format": "WEBP", "quality": 90},
    "apng": {"format": "PNG"},
    "gif": {"format": "GIF"},
}


@dataclass(frozen=True)
class Moment:
    """One step, decoded: x_t at the network's scale, and the x0 prediction."""

    number: int
    """From 1."""
    count: int
    t: float
    x_t: Image.Image
    x0: Image.Image
    second_pass: bool = False

    @property
    def label(self) -> str:
        """Its number and its timestep, in two lines."""
        return f"{'pass 2, ' if self.second_pass else ''}step {self.number} of {self.count}\nt {self.t:.5g}"


def chosen(steps: int | tuple[int, ...] | None, count: int) -> set[int]:
    """The numbers, from 1, of the chosen ones of `count` steps: so many evenly spread, exactly these, or (None) all."""
    if isinstance(steps, tuple):
        return {number for number in steps if number <= count}
    if steps is None or steps >= count:
        return set(range(1, count + 1))
    return {1 + round(place * (count - 1) / max(1, steps - 1)) for place in range(steps)}


def check_chosen(steps: int | tuple[int, ...] | None, count: int, size: tuple[int, int]) -> None:
    """Raise UsageError for steps that are not among `count`, or too many for one strip of images of that size."""
    if isinstance(steps, tuple) and max(steps) > count:
        raise UsageError(f"--trace: there is no step {max(steps)}; this image takes {count}")
    width, height = _within(size, STRIP_SIDE)
    check_size(2 * len(chosen(steps, count)), (width, height), enlarge=_enlarged((width, height)))


def strip(moments: Sequence[Moment]) -> bytes:
    """A PNG: x_t of each step above, its x0 prediction below."""
    cells = [_fitted(moment.x_t, STRIP_SIDE) for moment in moments]
    cells += [_fitted(moment.x0, STRIP_SIDE) for moment in moments]
    labels = [moment.label for moment in moments] + ["guess of x_0"] * len(moments)
    sheet = contact_sheet(cells, columns=len(moments), labels=labels, enlarge=_enlarged(cells[0].size))
    steps = [{"step": m.number, "of": m.count, "t": round(m.t, 4), "second_pass": m.second_pass} for m in moments]
    return sheet_bytes(sheet, {"steps": steps})


def animation(moments: Sequence[Moment], *, format: TraceFormat) -> bytes:
    """A frame for each step, x_t beside the x0 prediction; all as large as the last one."""
    size = _within(moments[-1].x_t.size, FRAME_SIDE)
    frames = [
        contact_sheet(
            [image.resize(size, Image.Resampling.BICUBIC) for image in (moment.x_t, moment.x0)],
            columns=2,
            labels=[moment.label, "guess of x_0"],
            enlarge=_enlarged(size),
        )
        for moment in moments
    ]
    each = min(SLOWEST_MS, WHOLE_MS // len(frames))
    data = io.BytesIO()
    durations = [*[max(20, each)] * (len(frames) - 1), HELD_MS]
    frames[0].save(data, save_all=True, append_images=frames[1:], duration=durations, loop=0, **_SAVE[format])
    return data.getvalue()


def _fitted(image: Image.Image, side: int) -> Image.Image:
    size = _within(image.size, side)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    factor = min(1.0, side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _enlarged(size: tuple[int, int]) -> int:
    return max(1, SMALL // max(size))
