"""`sdcli info` in real processes: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from sdcli.images.formats import ImageFormat
from sdcli.metadata.embed import image_bytes, parameters_text
from sdcli.metadata.read import read_image
from sdcli.metadata.record import Record
from sdcli.request.schema import GenerationRequest
from tests.conftest import Run
from tests.metadata.foreign_writers import stealth

RECORD = Record(
    GenerationRequest(
        prompt="a purple walrus\nat sea", negative_prompt="", prompt_template="{prompt}", model="tiny", seed=11,
        width=32, height=32, steps=4, guidance_scale=7.5, scheduler="ddim", eta=0.0,
    ),
    {"sdcli": "0.1.0", "weights": "random:tiny:0", "escape": "\x1b[31m\u202e"},
)  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "walrus.png"
    path.write_bytes(image_bytes(Image.new("RGB", (32, 32), "purple"), "png", RECORD))
    return path


def test_it_prints_request_and_provenance_and_names_the_source(sdcli: Run, image: Path) -> None:
    done = sdcli("info", image)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{image}: 32x32 png, record: sdcli\n")
    assert "prompt           a purple walrus\n                   at sea\n" in done.stdout
    assert "seed             11\n" in done.stdout
    assert "random:tiny:0" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout


def test_json_is_one_object_a_line_with_the_whole_record(sdcli: Run, image: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.webp"
    plain.write_bytes(image_bytes(Image.new("RGB", (16, 24)), "webp", None))
    done = sdcli("info", image, plain, "--json")
    assert done.returncode == 0
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "path": str(image), "status": "ok", "format": "png", "width": 32, "height": 32, "source": "sdcli",
        "request": RECORD.request.typed(), "provenance": RECORD.provenance, "parameters": parameters_text(RECORD),
        "unmapped": {},
    }  # fmt: skip
    assert (second["source"], second["request"], second["width"], second["height"]) == (None, None, 16, 24)


def test_an_image_without_a_record_is_no_failure(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "plain.jpg").write_bytes(image_bytes(Image.new("RGB", (16, 24)), "jpeg", None))
    done = sdcli("info", "plain.jpg")
    assert (done.returncode, done.stdout) == (0, "plain.jpg: 16x24 jpeg, no settings stored\n")


def test_one_bad_image_among_several_is_reported_and_the_rest_goes_on(sdcli: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(image.read_bytes()[:60])
    done = sdcli("info", "bad.png", "absent.png", image, "--json")
    assert done.returncode == 7
    bad, absent, good = map(json.loads, done.stdout.splitlines())
    assert (bad["status"], bad["exit_code"], absent["exit_code"], good["status"]) == ("failed", 1, 3, "ok")
    assert "2 of 3 images could not be read" in done.stderr
    assert "no file absent.png" in done.stderr


def test_a_single_bad_image_ends_with_its_own_code(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for name, code in (("absent.png", 3), ("text.png", 1)):
        done = sdcli("info", name)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("sdcli: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("format", get_args(ImageFormat))
def test_strip_writes_a_copy_that_says_nothing(sdcli: Run, tmp_path: Path, format: ImageFormat) -> None:
    path = tmp_path / f"walrus.{format}"
    path.write_bytes(image_bytes(Image.new("RGB", (32, 32), "purple"), format, RECORD))
    before = path.read_bytes()
    done = sdcli("info", path, "--strip")
    copy = tmp_path / f"walrus-stripped.{format}"
    assert (done.returncode, done.stdout) == (0, f"{copy}\n")
    assert path.read_bytes() == before
    assert all(word not in copy.read_bytes() for word in (b"walrus", b"w\0a\0l\0r", b"sdcli"))
    assert read_image(copy).source is None
    assert Image.open(copy).tobytes() == Image.open(path).tobytes()


def test_strip_says_what_it_leaves_in_the_pixels(sdcli: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stealth("a walrus\nSteps: 4, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 64x64"))
    done = sdcli("info", "a.png", "--strip")
    assert (done.returncode, "they are hidden in its pixels" in " ".join(done.stderr.split())) == (0, True)


def test_strip_never_overwrites_unless_asked(sdcli: Run, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_text("mine")
    refused = sdcli("info", image, "--strip", "-o", copy)
    assert (refused.returncode, copy.read_text()) == (8, "mine")
    assert sdcli("info", image, "--strip", "-o", copy, "--overwrite").returncode == 0
    assert read_image(copy).source is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-o", "x.png"), "--output has no effect without --strip"),
        (("--overwrite",), "--overwrite has no effect without --strip"),
        (("--strip", "walrus.png", "-o", "x.png"), "--output is for a single copy"),
        (("--strip", "-o", "x.jpg"), "is a png image"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    sdcli: Run, image: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = sdcli("info", image, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
