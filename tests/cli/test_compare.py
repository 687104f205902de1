"""`sdcli compare`: the distance of two images against its formulas, what records say differently, and how it ends."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdcli.errors import BadImage, BadOutput, NotFound, UsageError
from sdcli.images import metrics
from sdcli.images.metrics import distance, similarity
from sdcli.images.pixels import to_pixels
from sdcli.io.files import AlreadyExists
from sdcli.metadata.embed import image_bytes
from sdcli.metadata.record import Record
from sdcli.request.schema import GenerationRequest
from tests.generation.test_encode_decode import good, run

RECORD = Record(
    GenerationRequest(
        prompt="a fox\nin snow", negative_prompt="", prompt_template="{prompt}", model="tiny", seed=11, width=40,
        height=24, steps=4, guidance_scale=7.5, scheduler="ddim", eta=0.0,
    ),
    {"torch": "2.13.0", "weights": {"unet": "random:tiny:0", "vae": "random:tiny:0"}, "batch": {"size": 1, "index": 0}},
)  # fmt: skip
A1111 = "a fox\nSteps: 4, Sampler: DDIM, CFG scale: 7.5, Seed: {seed}, Size: 40x24, Model: {model}, Version: v1.10"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def noise(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def near(image: Image.Image, by: int) -> Image.Image:
    levels = np.asarray(image).astype(int) + np.random.default_rng(9).integers(-by, by + 1, (*image.size[::-1], 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def save(name: str, image: Image.Image, record: Record | None = None) -> Path:
    Path(name).write_bytes(image_bytes(image, "png", record))
    return Path(name)


def save_a1111(name: str, **fields: Any) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", A1111.format(**fields))
    noise(0).save(name, pnginfo=chunks)
    return Path(name)


def test_the_distance_is_that_of_its_formulas() -> None:
    a, b = noise(0), near(noise(0), 20)
    error = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    found = distance(a, b)
    assert found is not None
    assert found.largest == np.abs(error).max() == 20
    assert found.mean == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / np.mean(error**2)), rel=1e-12)
    assert distance(b, a) == found
    assert distance(a, a) == metrics.Distance(0, 0.0, math.inf)
    assert distance(Image.new("RGB", (3, 2)), Image.new("RGB", (3, 2), "white")) == metrics.Distance(255, 255.0, 0.0)
    assert distance(a, noise(0, (24, 40))) is None


def test_the_similarity_of_large_images_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise(0, (15, 50)), near(noise(0, (15, 50)), 60)
    whole = float(metrics.ssim(to_pixels(a)[None], to_pixels(b)[None]))
    assert 0 < whole < 0.99
    for windows in (1, 15 * 7, 15 * 40, 15 * 128):
        monkeypatch.setattr(metrics, "BAND", windows)
        assert similarity(a, b) == pytest.approx(whole, abs=1e-12)
    assert similarity(a, b) == similarity(b, a)
    assert similarity(a, a) == 1.0
    assert similarity(a, Image.eval(a, lambda level: 255 - level)) == pytest.approx(-0.9, abs=0.1)
    assert similarity(noise(0, (10, 50)), noise(1, (10, 50))) is None


def test_what_differs_is_told_of_pixels_requests_and_facts() -> None:
    other = replace(
        RECORD,
        request=RECORD.request.changed(seed=12, guidance_scale=7.5, negative_prompt="blur"),
        provenance={
            **RECORD.provenance,
            "torch": "2.14.0",
            "weights": {"unet": "random:tiny:1", "vae": "random:tiny:0"},
        },
    )
    save("a.png", noise(0), RECORD)
    save("b.png", near(noise(0), 3), other)
    (facts,) = run("compare", "a.png", "b.png", "--json").json
    assert facts["a"] == {"path": "a.png", "width": 40, "height": 24, "format": "png", "source": "sdcli"}
    assert (facts["identical"], facts["max_difference"]) == (False, 3)
    assert 35 < facts["psnr"] < 50
    assert 0.9 < facts["ssim"] < 1
    assert facts["request"] == {"negative_prompt": ["", "blur"], "seed": [11, 12]}
    assert facts["provenance"] == {"torch": ["2.13.0", "2.14.0"], "weights.unet": ["random:tiny:0", "random:tiny:1"]}
    out = good("compare", "a.png", "b.png")
    assert "  seed             11  ->  12" in out
    assert '  weights.unet  "random:tiny:0"  ->  "random:tiny:1"' in out


def test_an_image_and_its_copy_are_identical() -> None:
    save("a.png", noise(0), RECORD)
    save("copy.png", noise(0), RECORD)
    assert good("compare", "a.png", "copy.png", "--min-psnr", "inf")[2:] == [
        "pixels: identical",
        "request: identical",
        "provenance: identical",
    ]
    (facts,) = run("compare", "a.png", "copy.png", "--json").json
    assert (facts["identical"], facts["psnr"], facts["ssim"], facts["max_difference"]) == (True, None, 1.0, 0)
    assert (facts["request"], facts["provenance"]) == ({}, {})


def test_records_of_other_tools_are_compared_as_well() -> None:
    save("own.png", noise(0), RECORD)
    save("bare.png", noise(0))
    save_a1111("one.png", seed=11, model="x")
    save_a1111("two.png", seed=12, model="y")
    (facts,) = run("compare", "one.png", "two.png", "--json").json
    assert facts["request"] == {"seed": [11, 12]}
    assert facts["provenance"] == {"Model": ["x", "y"]}
    (facts,) = run("compare", "own.png", "one.png", "--json").json
    assert facts["request"]["prompt"] == ["a fox\nin snow", "a fox"]
    assert facts["provenance"] is None  # what two tools say of their runs has no names in common
    (facts,) = run("compare", "own.png", "bare.png", "--json").json
    assert (facts["identical"], facts["request"], facts["provenance"]) == (True, None, None)


def test_other_sizes_are_told_and_leave_no_figures() -> None:
    save("a.png", noise(0))
    save("b.png", noise(0, (24, 40)))
    (facts,) = run("compare", "a.png", "b.png", "--json").json
    assert [facts[name] for name in ("max_difference", "mean_difference", "psnr", "ssim")] == [None] * 4
    assert not facts["identical"]
    assert "pixels: different sizes" in good("compare", "a.png", "b.png")
    assert isinstance(run("compare", "a.png", "b.png", "--min-psnr", "0").error, BadOutput)
    outcome = run("compare", "a.png", "b.png", "--diff", "d.png")
    assert isinstance(outcome.error, UsageError)
    assert "a.png is 40x24, b.png 24x40" in str(outcome.error)
    assert not Path("d.png").exists()


def test_a_minimum_of_the_psnr_decides_the_exit_code() -> None:
    a, b = noise(0), near(noise(0), 8)
    save("a.png", a)
    save("b.png", b)
    found = distance(a, b)
    assert found is not None
    assert run("compare", "a.png", "b.png", "--min-psnr", str(found.psnr)).error is None
    for least in (str(found.psnr + 1e-6), "inf"):
        outcome = run("compare", "a.png", "b.png", "--min-psnr", least)
        assert isinstance(outcome.error, BadOutput)
        assert outcome.out[2].startswith("pixels: differ by up to 8 of 255")
    with pytest.raises(SystemExit):
        run("compare", "a.png", "b.png", "--min-psnr", "nan")


def test_the_difference_image_is_the_difference_amplified() -> None:
    a, b = noise(0), near(noise(0), 5)
    save("a.png", a)
    save("b.png", b)
    outcome = run("compare", "a.png", "b.png", "--diff", "d.png")
    assert "multiplied by 51" in outcome.err
    with Image.open("d.png") as shown:
        error = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
        assert np.array_equal(np.asarray(shown), error * 51)
    before = Path("d.png").read_bytes()
    assert isinstance(run("compare", "a.png", "a.png", "--diff", "d.png").error, AlreadyExists)
    assert Path("d.png").read_bytes() == before
    good("compare", "a.png", "a.png", "--diff", "d.png", "--overwrite")
    with Image.open("d.png") as black:
        assert black.getbbox() is None


def test_images_are_compared_as_they_are_shown() -> None:
    """Upright, and with transparent parts on white."""
    image = noise(0)
    save("a.png", image)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    clear = Image.new("RGBA", image.size, (1, 2, 3, 0))
    clear.save("clear.png")
    save("white.png", Image.new("RGB", image.size, "white"))
    for one, other in (("a.png", "turned.png"), ("clear.png", "white.png")):
        (facts,) = run("compare", one, other, "--json").json
        assert facts["identical"], (one, other)


def test_each_wrong_wish_and_broken_file_ends_with_its_own_error() -> None:
    save("a.png", noise(0))
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("text.png").write_text("hello")
    cases = [
        (["a.png", "absent.png"], NotFound, "no file absent.png"),
        (["cut.png", "a.png"], BadImage, "cut.png"),
        (["a.png", "text.png"], BadImage, "text.png: is not a PNG"),
        (["a.png", "."], BadImage, "is a folder"),
        (["a.png", "a.png", "--overwrite"], UsageError, "no effect without --diff"),
        (["a.png", "a.png", "--diff", "d.jpg"], UsageError, "should end in .png"),
    ]
    for arguments, error, sentence in cases:
        outcome = run("compare", *arguments)
        assert isinstance(outcome.error, error), arguments
        assert sentence in str(outcome.error)
        assert outcome.out == []


def test_ssim_falls_as_noise_grows_and_stays_between_its_bounds() -> None:
    a = noise(0)
    values = [similarity(a, near(a, by)) for by in (1, 10, 50, 120)]
    assert all(value is not None for value in values)
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    assert torch.tensor(values).abs().max() <= 1
