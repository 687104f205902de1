"""The invisible watermark: what goes in comes out, little changes, and an image that cannot carry it is not saved."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdcli.errors import BadOutput, UsageError
from sdcli.images.watermark import watermark_of, with_watermark
from sdcli.request.schema import parse_request
from tests.conftest import REPOSITORY, Run

ROCKET = Image.open(REPOSITORY / "docs/gallery/a-rocket.png").convert("RGB")


@given(
    st.text(st.characters(categories=("L", "N", "P"), max_codepoint=0x7FF), min_size=1, max_size=4),
    st.sampled_from([128, 200, 256]),
)
@settings(max_examples=10)
def test_a_text_comes_out_as_it_went_in_and_little_changes(text: str, side: int) -> None:
    image = ROCKET.resize((side, side))
    with_text = with_watermark(image, text)
    assert watermark_of(with_text) == text
    assert np.abs(np.asarray(with_text, int) - np.asarray(image, int)).mean() < 1.5


def test_a_plain_image_has_none() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    assert [watermark_of(image) for image in (ROCKET, noise, Image.new("RGB", (64, 64)))] == [None] * 3


def test_it_survives_a_jpeg_of_high_quality() -> None:
    file = io.BytesIO()
    with_watermark(ROCKET.resize((256, 256)), "sdcli").save(file, "JPEG", quality=95, subsampling=0)
    assert watermark_of(Image.open(file)) == "sdcli"


def test_the_bits_are_where_other_tools_look_for_them() -> None:
    """invisible-watermark's `dwtDct` read plainly: block after block, the largest but the first, a bit each."""
    pixels = np.asarray(with_watermark(ROCKET, "AI"), dtype=np.float64)
    blue_less_luma = pixels[..., 2] - pixels @ [0.299, 0.587, 0.114]
    chroma = 128 + 0.492 * blue_less_luma
    low = (chroma[0::2, 0::2] + chroma[1::2, 0::2] + chroma[0::2, 1::2] + chroma[1::2, 1::2]) / 2
    votes: list[list[bool]] = [[] for _ in range(8 * (len("AI") + 2))]
    number = 0
    for top in range(0, 64, 4):
        for left in range(0, 64, 4):
            block = low[top : top + 4, left : left + 4].flatten()
            largest = abs(block[np.argmax(abs(block[1:])) + 1])
            votes[number % len(votes)].append(largest % 36 > 18)
            number += 1
    assert np.packbits([np.mean(one) > 0.5 for one in votes]).tobytes()[:2] == b"AI"


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(BadOutput, match="64x64 pixels are too few"):
        with_watermark(ROCKET.resize((64, 64)), "far too long")


@pytest.mark.parametrize("text", ["x" * 33, "two\nlines", ""])
def test_a_text_that_is_no_short_line_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="watermark"):
        parse_request({"watermark": text})


@pytest.mark.slow
def test_generate_marks_info_reads_and_verify_agrees(sdcli: Run, tmp_path: Path) -> None:
    done = sdcli("generate", "a cat", "--steps", "2", "--watermark", "AI", "-o", "cat.png", "-q", "--seed", "1")
    assert done.returncode == 0, done.stderr
    told = sdcli("info", "cat.png", "--watermark", "--json")
    assert json.loads(told.stdout)["watermark"] == "AI"
    assert sdcli("generate", "--from", "cat.png", "--verify").returncode == 0
    small = sdcli("generate", "a cat", "-m", "tiny", "--watermark", "too long for 64 pixels", "-o", "no.png", "-q")
    assert small.returncode == 2
    assert "64x64 pixels has room for 0 bytes" in small.stderr
    assert not (tmp_path / "no.png").exists()
