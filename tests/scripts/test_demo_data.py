"""The scripts that make demonstration data, run as a user runs them, on tiny packages and without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.data.sources import open_images
from tests.conftest import REPOSITORY

EMOJI_SCRIPT = REPOSITORY / "scripts" / "make_emoji_dataset.py"
DIGITS_SCRIPT = REPOSITORY / "scripts" / "make_digits_dataset.py"

GROUPS = {
    "groups": {"2": "component", "3": "animals-nature", "4": "food-drink", "5": "travel-places"},
    "subgroups": {"32": "skin-tone", "34": "animal-mammal", "42": "food-fruit", "55": "transport-water"},
}


def entry(code: str, label: str, group: int, subgroup: int, order: int, tags: list[str]) -> dict[str, Any]:
    return {"hexcode": code, "label": label, "group": group, "subgroup": subgroup, "order": order, "tags": tags}


ENTRIES = [
    entry("1F34E", "red apple", 4, 42, 5, ["apple", "food", "fruit", "ripe"]),
    entry("1F347", "grapes", 4, 42, 4, ["fruit"]),
    entry("1F436", "dog face", 3, 34, 1, ["animal", "pet"]),
    entry("2693-FE0F", "anchor", 5, 55, 7, ["ship"]),
    entry("1F30A", "unseen wave", 5, 55, 8, []),
    entry("1F980", "crab’s shell", 3, 34, 3, ["animal", "food"]),
    entry("1F3FB", "light skin tone", 2, 32, 2, []),
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]


def icon(colour: str, *, x: int = 4, y: int = 4, width: int = 8, height: int = 8) -> dict[str, str]:
    return {"body": f'<rect fill="{colour}" x="{x}" y="{y}" width="{width}" height="{height}"/>'}


ICONS = {
    "icons": {
        "red-apple": icon("#ff0000"),
        "grapes": icon("#800080", width=4),
        "dog-face": icon("#808080"),
        "old-anchor": icon("#0000ff", x=0, width=2) | {"hidden": "true"},
        "unseen-wave": {"body": ""},
    },
    "aliases": {
        "anchor": {"parent": "old-anchor", "hFlip": True},
        "crabs-shell": {"parent": "dog-face", "rotate": 1},
    },
    "width": 16,
    "height": 16,
}
FILES = {
    "emojibase-data": {
        "package.json": {"version": "1.2.3", "author": "Somebody", "license": "MIT"},
        "en/data.json": ENTRIES,
        "meta/groups.json": GROUPS,
    },
    **{
        f"@iconify-json/{style}": {
            "package.json": {"version": "4.5.6"},
            "info.json": {"license": {"title": "CC BY 4.0", "url": "https://licence"}, "author": {"name": "Artist"}},
            "chars.json": {"2693": "anchor"},
            "icons.json": ICONS,
        }
        for style in ("fluent-emoji-flat", "noto")
    },
}
# The rasteriser, for rectangles alone.
RESVG = """
import io, re
from PIL import Image, ImageDraw
def svg_to_bytes(*, svg_string, width, skip_system_fonts):
    left, top, across, down = map(float, re.search('viewBox="([^"]*)"', svg_string)[1].split())
    image = Image.new("RGBA", (width, round(width * down / across)), (0, 0, 0, 0))
    for colour, *box in re.findall('<rect fill="(.*?)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', svg_string):
        x, y, w, h = (float(value) * width / across for value in box)
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The packages as `npm install` leaves them, and a stand-in for the rasteriser."""
    for name, files in FILES.items():
        for member, content in files.items():
            path = tmp_path / "packages" / "node_modules" / name / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    (tmp_path / "rasteriser").mkdir()
    (tmp_path / "rasteriser" / "resvg_py.py").write_text(RESVG)
    return tmp_path / "packages"


def run(script: Path, *arguments: str | Path, rasteriser: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(rasteriser or ""), "PATH": ""}  # no npm
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def make(packages: Path, out: str, *arguments: str) -> Path:
    folder = packages.parent / out
    done = run(EMOJI_SCRIPT, folder, "--packages", packages, *arguments, rasteriser=packages.parent / "rasteriser")
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    return folder


def entries(folder: Path) -> dict[str, list[str]]:
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return {line["label"]: line["text"] for line in lines}


def loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_the_data_set_is_one_that_training_opens(packages: Path) -> None:
    out = make(packages, "emoji")
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "anchor.png", "dog-face.png", "grapes.png", "red-apple.png",
    ]  # fmt: skip
    images = open_images(out)
    items = {images[index].label: images[index] for index in range(len(images))}
    assert set(items) == {"anchor", "dog face", "grapes", "red apple"}
    assert not images.dropped
    assert list(items["red apple"].captions) == entries(out)["red apple"]
    assert "- emojibase-data 1.2.3, Somebody: MIT\n" in (out / "SOURCES.md").read_text()
    assert "4.5.6, drawn by Artist (no address): CC BY 4.0, https://licence" in (out / "SOURCES.md").read_text()


def test_captions_are_wordings_of_the_name(packages: Path) -> None:
    texts = entries(make(packages, "emoji"))
    assert texts["red apple"] == [
        "a red apple", "red apple", "a picture of a red apple", "an emoji of a red apple", "clip art of a red apple",
        "red apple, food, fruit, ripe", "an apple",
    ]  # fmt: skip
    assert texts["dog face"][0] == "the face of a dog"
    assert texts["dog face"][-1] == "a dog"
    assert texts["grapes"][:3] == ["grapes", "a picture of grapes", "an emoji of grapes"]
    assert "a blue anchor" in texts["anchor"]
    for wordings in texts.values():
        assert 5 <= len(wordings) == len(set(wordings)) <= 8


def test_a_drawing_is_cropped_centred_and_padded_on_white(packages: Path) -> None:
    out = make(packages, "emoji", "--size", "100", "--margin", "0.1")
    with Image.open(out / "pictures" / "grapes.png") as opened:
        grapes = opened.convert("RGB")
        assert (opened.mode, opened.size) == ("RGB", (100, 100))
    inked = (np.asarray(grapes) != 255).any(axis=2)
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    assert (rows[0], rows[-1]) == pytest.approx((10, 89), abs=2)
    assert (columns[0], columns[-1]) == pytest.approx((30, 69), abs=2)
    assert grapes.getpixel((50, 50)) == (128, 0, 128)


def test_transparent_images_have_no_halo(packages: Path) -> None:
    out = make(packages, "emoji", "--transparent", "--size", "37")
    with Image.open(out / "pictures" / "red-apple.png") as opened:
        red, green, blue, alpha = (np.asarray(band) for band in opened.split())
    assert (alpha == 0).any()
    visible = alpha > 8
    assert red[visible].min() > 250  # a colour that was multiplied by its alpha twice would be darker at the edge
    assert max(green[visible].max(), blue[visible].max()) < 5


def test_a_mirrored_alias_is_mirrored_and_other_turns_are_left_out() -> None:
    module = loaded(EMOJI_SCRIPT)
    stripe = '<svg viewBox="0 0 4 4"/>'
    drawing = module.Drawing(module.Emoji("1", "food-drink", "x", ()), "noto", stripe, True)
    left = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    left.paste((255, 0, 0, 255), (0, 0, 4, 16))
    left.paste((0, 0, 255, 255), (4, 0, 16, 16))
    data = io.BytesIO()
    left.save(data, "PNG")
    fake = ModuleType("resvg_py")
    fake.svg_to_bytes = lambda **_: data.getvalue()  # type: ignore[attr-defined]
    sys.modules["resvg_py"] = fake
    try:
        image = module.rasterise(drawing, size=16, margin=0.0, transparent=False)
    finally:
        del sys.modules["resvg_py"]
    assert image.getpixel((1, 8))[2] > 200
    assert image.getpixel((14, 8))[0] > 200


def test_equal_options_give_equal_files(packages: Path) -> None:
    first, second = (make(packages, name, "--style", "noto", "--hold-out", "0.4") for name in ("a", "b"))

    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(first) == digests(second)


def test_held_out_concepts_stay_so_in_every_style_and_format(packages: Path) -> None:
    one = make(packages, "one", "--hold-out", "0.5")
    two = make(
        packages, "two", "--hold-out", "0.5", "--style", "noto", "--style", "fluent-emoji-flat", "--captions", "txt"
    )
    held = {path.stem for path in (one / "validation" / "pictures").glob("*.png")}
    kept = {path.stem for path in (one / "train" / "pictures").glob("*.png")}
    assert held
    assert kept
    assert {path.name for path in (two / "validation" / "pictures").iterdir()} == {
        f"{name}-{style}.{kind}" for name in held for style in ("noto", "fluent-emoji-flat") for kind in ("png", "txt")
    }
    assert not list(two.rglob("metadata.jsonl"))
    name = min(kept)
    texts = {
        style: (two / "train" / "pictures" / f"{name}-{style}.txt").read_text().splitlines()
        for style in ("noto", "fluent-emoji-flat")
    }
    assert texts["noto"][0].endswith(", cartoon style")
    assert texts["fluent-emoji-flat"][0].endswith(", flat style")
    assert len(texts["noto"]) >= 5


def test_groups_and_limits_choose_concepts(packages: Path) -> None:
    assert set(entries(make(packages, "a", "--groups", "food-drink"))) == {"red apple", "grapes"}
    assert set(entries(make(packages, "b", "--groups", "animal-mammal,transport-water"))) == {"dog face", "anchor"}
    assert set(entries(make(packages, "c", "--limit", "2"))) == {"dog face", "red apple"}


def test_tarballs_of_npm_pack_are_read_unpacked(packages: Path, tmp_path: Path) -> None:
    whole = make(packages, "whole")
    (tmp_path / "packed").mkdir()
    for name in ("emojibase-data", "@iconify-json/fluent-emoji-flat"):
        file = f"{name.removeprefix('@').replace('/', '-')}-1.0.0.tgz"
        with tarfile.open(tmp_path / "packed" / file, "w:gz") as tarball:
            tarball.add(packages / "node_modules" / name, arcname="package")
    done = run(EMOJI_SCRIPT, tmp_path / "out", "--packages", tmp_path / "packed", rasteriser=tmp_path / "rasteriser")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "metadata.jsonl").read_bytes() == (whole / "metadata.jsonl").read_bytes()


@pytest.mark.slow
def test_an_error_is_a_sentence(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "bare").mkdir()
    rasteriser = tmp_path / "rasteriser"
    cases: list[tuple[list[str | Path], Path | None, str]] = [
        ([tmp_path / "full", "--packages", packages], rasteriser, "exists and is not empty"),
        ([tmp_path / "out"], rasteriser, "npm is needed"),
        ([tmp_path / "out", "--packages", tmp_path / "bare"], rasteriser, "has no package of emojibase-data"),
        (
            [tmp_path / "out", "--packages", packages, "--groups", "food"],
            rasteriser,
            "no group 'food'; there are animal-",
        ),
        ([tmp_path / "out", "--packages", packages, "--groups", "component"], rasteriser, "no group 'component'"),
        ([tmp_path / "out", "--packages", packages, "--size", "4"], rasteriser, "--size must be 8 to 1024"),
        ([tmp_path / "out", "--packages", packages, "--style", "comic"], rasteriser, "invalid choice"),
    ]
    if importlib.util.find_spec("resvg_py") is None:
        cases.append(([tmp_path / "out", "--packages", packages], None, "pip install resvg-py"))
    for arguments, path, sentence in cases:
        done = run(EMOJI_SCRIPT, *arguments, rasteriser=path)
        assert done.returncode, sentence
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_articles_follow_the_sound() -> None:
    module = loaded(EMOJI_SCRIPT)
    names = [
        "apple",
        "unicorn",
        "umbrella",
        "ukulele",
        "hourglass done",
        "x-ray",
        "ewe",
        "octopus",
        "glasses",
        "bus",
        "bread",
    ]
    assert [module.with_article(name) for name in names] == [
        "an apple", "a unicorn", "an umbrella", "a ukulele", "an hourglass done", "an x-ray", "a ewe", "an octopus",
        "glasses", "a bus", "bread",
    ]  # fmt: skip


def test_only_a_colour_that_everybody_would_name_is_named() -> None:
    module = loaded(EMOJI_SCRIPT)
    for colour, name in [("#e02020", "red"), ("#f0d020", "yellow"), ("#20a030", "green"), ("#2050e0", "blue")]:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (8, 8, 56, 56))
        assert module.colour_of(image) == name
        image.paste("#808080", (8, 8, 56, 30))
        assert module.colour_of(image) is None
    for colour in ("white", "black", "#808080", "#8b4513", "#c5104b"):
        assert module.colour_of(Image.new("RGB", (64, 64), colour)) is None


@pytest.mark.slow
def test_digits_become_class_folders_with_all_their_levels(tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    done = run(DIGITS_SCRIPT, tmp_path / "digits")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'digits'}\n"), done.stderr
    images = open_images(tmp_path / "digits")
    assert (len(images), images.classes) == (1797, tuple("0123456789"))
    digits = sklearn.load_digits()
    for label in (0, 7):
        expected = digits.images[digits.target == label]
        files = sorted((tmp_path / "digits" / str(label)).iterdir())
        assert len(files) == len(expected)
        for file, levels in list(zip(files, expected, strict=True))[:20]:
            with Image.open(file) as image:
                assert image.mode == "L"
                assert np.array_equal(np.asarray(image), (levels * 255 / 16).round())
    assert run(DIGITS_SCRIPT, tmp_path / "digits").returncode == 2


def test_digits_can_be_larger(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8)).astype(np.float64)
    write = loaded(DIGITS_SCRIPT).write
    write(images, np.array([5, 1, 5]), tmp_path, size=32, method=Image.Resampling.NEAREST)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["1/1-000.png", "5/5-000.png", "5/5-001.png"]
    with Image.open(tmp_path / "5" / "5-001.png") as image:
        levels = np.asarray(image)
    assert np.array_equal(levels, (images[2] * 255 / 16).round().repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize("script", [EMOJI_SCRIPT, DIGITS_SCRIPT])
def test_help_explains(script: Path) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert "pip install" in done.stdout
