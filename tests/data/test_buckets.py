"""Aspect-ratio buckets and cuts: sizes, symmetries, and nothing of an image moved that need not move."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sdcli.data.buckets import BucketFill, Bucketing, bucket_fills, bucket_sizes, resize_and_crop
from sdcli.errors import UsageError
from sdcli.images.pixels import fit
from tests.images.test_images import distance, sample_image

SQUARE = Bucketing(bucket_sizes((512, 512)))
sides = st.integers(1, 10_000)


def kohya_buckets(width: int, height: int, smallest: int, largest: int, step: int) -> list[tuple[int, int]]:
    """`make_bucket_resolutions` of kohya's sd-scripts, from its description."""
    area, found = width * height, set()
    square = int(area**0.5) // step * step
    found.add((square, square))
    for across in range(smallest, largest + 1, step):
        down = min(largest, area // across // step * step)
        if down >= smallest:
            found |= {(across, down), (down, across)}
    return sorted(found)


@pytest.mark.parametrize("side", [256, 512, 768, 1024])
def test_the_buckets_of_a_square_resolution_are_kohyas(side: int) -> None:
    ours = bucket_sizes((side, side), smallest=side // 2, largest=2 * side)
    assert list(ours) == kohya_buckets(side, side, side // 2, 2 * side, 64)
    assert ours == bucket_sizes((side, side))


@given(st.integers(2, 24), st.integers(2, 24), st.sampled_from([8, 16, 64]))
def test_every_bucket_fits_the_area_the_step_and_the_limits(across: int, down: int, step: int) -> None:
    resolution = (across * step, down * step)
    buckets = bucket_sizes(resolution, step=step)
    assert resolution in buckets
    for width, height in buckets:
        assert width * height <= resolution[0] * resolution[1]
        assert width % step == height % step == 0
        assert min(resolution) // 2 <= min(width, height)
        assert max(width, height) <= 2 * max(resolution)
        assert resolution == (width, height) or (height, width) in buckets


def test_impossible_buckets_are_refused() -> None:
    with pytest.raises(UsageError, match="multiples of the buckets' step, 64"):
        bucket_sizes((500, 512))
    with pytest.raises(UsageError, match="leave out 512x512 itself"):
        bucket_sizes((512, 512), smallest=640)
    with pytest.raises(UsageError):
        Bucketing(())


@given(sides, sides, st.integers(1, 1000))
def test_the_bucket_depends_on_proportions_only(width: int, height: int, scale: int) -> None:
    assert SQUARE.bucket_for((width, height)) == SQUARE.bucket_for((width * scale, height * scale))


@given(sides, sides)
def test_an_image_on_its_side_gets_the_bucket_on_its_side(width: int, height: int) -> None:
    across, down = SQUARE.bucket_for((width, height))
    assert SQUARE.bucket_for((height, width)) == (down, across)


@pytest.mark.parametrize("bucket", SQUARE.buckets)
def test_a_bucket_is_its_own_bucket(bucket: tuple[int, int]) -> None:
    assert SQUARE.bucket_for(bucket) == bucket


@settings(max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_frame_has_exactly_the_size(w: int, h: int, width: int, height: int, x: float, y: float, flip: bool) -> None:
    assert resize_and_crop(Image.new("RGB", (w, h)), (width, height), at=(x, y), flip=flip).size == (width, height)


def test_an_image_of_the_size_keeps_every_pixel_and_a_cut_keeps_those_it_takes() -> None:
    image = sample_image(64, 48)
    assert resize_and_crop(image, (64, 48)).tobytes() == image.tobytes()
    for at, left in ((0.0, 0), (0.5, 8), (1.0, 16)):
        assert (
            resize_and_crop(image, (48, 48), at=(at, 0.3)).tobytes() == image.crop((left, 0, left + 48, 48)).tobytes()
        )


def test_the_corners_are_reached() -> None:
    image = Image.fromarray(np.arange(100 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(50, 100, 3))
    assert resize_and_crop(image, (20, 50), at=(0, 0)).tobytes() == image.crop((0, 0, 20, 50)).tobytes()
    assert resize_and_crop(image, (20, 50), at=(1, 1)).tobytes() == image.crop((80, 0, 100, 50)).tobytes()


def test_the_middle_is_what_encode_cuts_out() -> None:
    for size in ((32, 32), (24, 40), (40, 24)):
        assert distance(resize_and_crop(sample_image(128, 64), size), fit(sample_image(128, 64), size)) <= 3


def test_a_flip_is_the_mirrored_frame() -> None:
    image = sample_image(60, 40)
    assert resize_and_crop(image, (30, 32), at=(0.2, 0.9), flip=True).tobytes() == (
        ImageOps.mirror(resize_and_crop(image, (30, 32), at=(0.2, 0.9))).tobytes()
    )


def test_places_are_random_only_when_asked() -> None:
    fixed, free = Bucketing(((64, 64),)), Bucketing(((64, 64),), random_crop=True)
    assert fixed.crop_position(random.Random(0)) == (0.5, 0.5)
    places = [free.crop_position(random.Random(seed)) for seed in range(50)]
    assert places == [free.crop_position(random.Random(seed)) for seed in range(50)]
    assert len(set(places)) == 50
    assert all(0 <= x < 1 and 0 <= y < 1 for x, y in places)


def fills_of(sizes: list[tuple[int, int]], *, batch_size: int) -> list[BucketFill]:
    return bucket_fills(sizes, [SQUARE.bucket_for(size) for size in sizes], batch_size=batch_size)


def test_bucket_fills_count_every_image_once_in_buckets_that_fill_a_step() -> None:
    sizes = [(512, 512)] * 5 + [(1024, 512)] * 3 + [(100, 100)]
    assert fills_of(sizes, batch_size=3) == [
        BucketFill((512, 512), images=6, repeats=0, enlarged=1),
        BucketFill((704, 320), images=3, repeats=0, enlarged=0),
    ]
    assert fills_of(sizes, batch_size=4) == [BucketFill((512, 512), images=9, repeats=0, enlarged=1, merged=3)]
    assert fills_of(sizes[:1], batch_size=4) == [BucketFill((512, 512), images=1, repeats=3, enlarged=0)]
