"""Aspect-ratio bucketing: the training size for an image of any size, and resizing and cropping to it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image, ImageOps

from sdcli.errors import UsageError

Size = tuple[int, int]
"""Width and height in pixels."""

BUCKET_STEP = 64


@dataclass(frozen=True)
class Bucketing:
    """The sizes that images are resized and cropped to, and where they are cropped."""

    buckets: tuple[Size, ...]
    """All sizes; a single one without aspect-ratio buckets."""
    random_crop: bool = False

    def __post_init__(self) -> None:
        if not self.buckets:
            raise UsageError("there must be at least one bucket")

    def bucket_for(self, size: Size) -> Size:
        """The bucket whose aspect ratio is nearest to the image's (by the ratio of the two; the largest of equals).

        It depends on the image's aspect ratio only; a rotated image gets the rotated bucket.
        """
        width, height = size

        def distance(bucket: Size) -> tuple[float, int, Size]:
            across, down = width * bucket[1], height * bucket[0]
            return max(across, down) / min(across, down), -bucket[0] * bucket[1], bucket

        return min(self.buckets, key=distance)

    def crop_position(self, source: random.Random) -> tuple[float, float]:
        """The `at` of `resize_and_crop`: random with `random_crop`, otherwise the centre."""
        return (source.random(), source.random()) if self.random_crop else (0.5, 0.5)


def bucket_sizes(
    resolution: Size, *, step: int = BUCKET_STEP, smallest: int | None = None, largest: int | None = None
) -> tuple[Size, ...]:
    """The aspect-ratio buckets of a resolution, sorted: multiples of `step`, none with more pixels than `resolution`.

    For each width from `smallest` to `largest` the greatest height that fits, the same rotated, and the resolution
    itself. This is how kohya's sd-scripts make them (`make_bucket_resolutions`), and NovelAI before. The
    sides go from half the shorter side to twice the longer one by default (256 to 1024 for 512x512).
    Raises UsageError for limits that leave nothing, or a resolution that is no multiple of `step`.
    """
    width, height = resolution
    if step < 1 or width < 1 or height < 1 or width % step or height % step:
        raise UsageError(f"the sides of {width}x{height} must be multiples of the buckets' step, {step}")
    smallest = min(width, height) // 2 if smallest is None else smallest
    largest = 2 * max(width, height) if largest is None else largest
    if smallest > min(width, height) or largest < max(width, height):
        raise UsageError(f"buckets of {smallest} to {largest} pixels a side leave out {width}x{height} itself")
    area, sizes = width * height, {resolution}
    first = max(step, math.ceil(smallest / step) * step)
    for across in range(first, largest + 1, step):
        down = min(largest, area // across) // step * step
        if down >= first:
            sizes |= {(across, down), (down, across)}
    return tuple(sorted(sizes))


def resize_and_crop(
    image: Image.Image, size: Size, *, at: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Image.Image:
    """Resize an RGB image with Lanczos until it covers `size`, and crop it to exactly that.

    `at` is the position of the crop, 0..1 from left to right and from top to bottom; (0.5, 0.5) is the centre. It is
    rounded to whole pixels, so an image that needs no resizing keeps its pixels. `flip` mirrors the result.
    """
    width, height = size
    covering, (left, top) = crop_place(image.size, size, at=at)
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.LANCZOS)
    cut = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(cut) if flip else cut


def crop_place(original: Size, size: Size, *, at: tuple[float, float] = (0.5, 0.5)) -> tuple[Size, tuple[int, int]]:
    """What `resize_and_crop` does to an image of a size: the size that it resizes to, and the crop's left and top."""
    (across, down), (width, height) = original, size
    scale = max(width / across, height / down)
    covering = (max(width, round(across * scale)), max(height, round(down * scale)))
    return covering, (round(at[0] * (covering[0] - width)), round(at[1] * (covering[1] - height)))


@dataclass(frozen=True)
class BucketFill:
    """How many images of a run fall into a bucket."""

    size: Size
    images: int
    repeats: int
    """Samples of a step that are there once more, because the bucket has fewer samples than a step; else 0."""
    enlarged: int
    """Images that are smaller than the bucket and would be enlarged."""
    merged: int = 0
    """Images whose own bucket was too small for a step; they are cropped more than they would be there."""


def merged_buckets(counts: Mapping[Size, int], batch: int) -> dict[Size, Size]:
    """Bucket -> the bucket that its images are trained in, so that each has at least `batch` samples an epoch.

    All samples of a step have one size. A bucket with fewer samples than a step would repeat them within the step, and
    be due once in many epochs. So the smallest one joins its neighbour of the nearest aspect ratio, until no bucket is
    too small or only one is left. `counts`: samples of an epoch by bucket.
    """
    target = {size: size for size in counts}
    left = dict(counts)
    while len(left) > 1 and min(left.values()) < batch:
        small = min(left, key=lambda size: (left[size], size))
        near = min(left.keys() - {small}, key=lambda size: (_turn(small, size), -left[size], size))
        left[near] += left.pop(small)
        target = {size: near if into == small else into for size, into in target.items()}
    return target


def bucket_fills(
    sizes: Sequence[Size], buckets: Sequence[Size], *, batch_size: int, repeats: Sequence[int] | None = None
) -> list[BucketFill]:
    """The buckets of a run, the fullest first, as `merged_buckets` makes them for steps of `batch_size` samples.

    `sizes` and `buckets` are those of each image, `repeats` how often it is sampled in an epoch (default: once).
    """
    times = [1] * len(sizes) if repeats is None else repeats
    into = merged_buckets(samples_of(buckets, times), batch_size)
    counts: dict[Size, list[int]] = {}
    for size, own, often in zip(sizes, buckets, times, strict=True):
        bucket = into[own]
        count = counts.setdefault(bucket, [0, 0, 0, 0])
        count[0] += 1
        count[1] += often
        count[2] += size[0] < bucket[0] or size[1] < bucket[1]
        count[3] += bucket != own
    fills = [
        BucketFill(size, images, max(0, batch_size - samples), enlarged, merged)
        for size, (images, samples, enlarged, merged) in counts.items()
    ]
    return sorted(fills, key=lambda fill: (-fill.images, fill.size))


def samples_of(buckets: Iterable[Size], repeats: Iterable[int]) -> dict[Size, int]:
    """Bucket -> its samples of an epoch."""
    counts: Counter[Size] = Counter()
    for bucket, often in zip(buckets, repeats, strict=True):
        counts[bucket] += often
    return dict(counts)


def _turn(one: Size, other: Size) -> Fraction:
    """How different two aspect ratios are: the ratio of the two, at least 1."""
    ratio = Fraction(one[0] * other[1], one[1] * other[0])
    return max(ratio, 1 / ratio)
