"""Sweeps: every combination of some fields' values, generated in shared batches and laid out on a sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdcli.cli.sweep_sheet import SweepSheet
from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.settings import OutputSettings
from sdcli.images.contact_sheet import KEY
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line
from sdcli.request.sweep import Axis, parse_axis, swept
from tests.conftest import Run


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("steps=10,20", Axis("steps", ("10", "20"))),
        ("guidance-scale=1..9x3", Axis("guidance_scale", ("1", "5", "9"))),
        ("cfg-scale=7..3,5", Axis("guidance_scale", ("7..3", "5"))),
        ("strength=0.1..0.3x3", Axis("strength", ("0.1", "0.2", "0.3"))),
        ('prompt="a cat, sitting", a dog', Axis("prompt", ("a cat, sitting", "a dog"))),
        ("size=64x64,96x64", Axis("size", ("64x64", "96x64"))),
    ],
)
def test_an_axis_is_read_as_it_is_written(text: str, axis: Axis) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stps=1", "no field 'stps'; did you mean 'steps'"),
        ("steps", "is written as steps=10,20"),
        ("steps=", "is written as"),
        ("steps=1,,2", "is written as"),
        ("steps=1,1", "takes a value twice"),
        ("steps=1..9x1", "two values or more"),
        ("schema=1", "no field"),
        ('prompt="a', "is not a list of values"),
    ],
)
def test_an_axis_that_is_not_understood_is_told(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_axis(text)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_every_combination_comes_once_and_a_line_keeps_its_seed(sizes: list[int], prompts: int) -> None:
    names = ("steps", "guidance_scale", "eta")
    axes = [Axis(name, tuple(map(str, range(size)))) for name, size in zip(names, sizes, strict=False)]
    lines = swept([Line(n, {"prompt": f"p{n}"}) for n in range(prompts)], axes, {}, base_seed=1)
    combinations = {tuple(sorted((k, v) for k, v in line.fields.items() if k != "seed")) for line in lines}
    product = prompts
    for axis in axes:
        product *= len(axis.values)
    assert len(combinations) == len(lines) == product
    assert len({(line.fields["prompt"], line.fields["seed"]) for line in lines}) == prompts


@pytest.mark.parametrize(
    ("axes", "typed", "problem"),
    [
        (["steps=1,2"], {"steps": 3}, "steps has a value already"),
        (["steps=1,2", "steps=3"], {}, "swept twice"),
        (["guidance-scale=5,7..3"], {"guidance_end": "2"}, "guidance_end has a value already"),
        (["guidance-scale=5,7..3", "guidance-end=1,2"], {}, "swept twice"),
        (["guidance-scale=5,7...3"], {}, "'7...3' is neither a number nor two of them"),
        (["prompt=a,b"], {}, "prompt has a value already"),
        (["steps=1..999x999", "eta=0..1x99"], {}, "98,901 combinations are more than 10,000"),
    ],
)
def test_a_sweep_without_sense_is_refused(axes: list[str], typed: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        swept([Line(0, {"prompt": "a"})], list(map(parse_axis, axes)), typed, base_seed=0)


def test_what_failed_leaves_its_places_on_the_sheet_empty(tmp_path: Path) -> None:
    lines = swept([Line(0, {"prompt": "a"})], [parse_axis("steps=1,2,0"), parse_axis("eta=0,1")], {}, base_seed=0)
    typed = {"model": "tiny", "scheduler": "ddim"}
    jobs = list(expand(lines, typed, load_registry(), num_images=2, base_seed=0))
    assert len(jobs) == 10, "a refused combination is one job"
    sheet = SweepSheet.of(jobs, [Axis("eta", ("0", "1"))], num_images=2)
    assert (sheet.columns, len(sheet.places)) == (4, 12)
    sheet.check()
    paths = {job.index: tmp_path / f"{job.index}.png" for job in jobs[1:] if isinstance(job, ResolvedJob)}
    for path in paths.values():
        Image.new("RGB", (96, 64), "red").save(path)
    sheet.write(paths, OutputSettings(outdir=tmp_path), Console(quiet=True))
    with Image.open(tmp_path / "sweep.png") as opened:
        columns = [(opened.crop((n * 104 + 8, 8, n * 104 + 104, 72)).getpixel((50, 50))) for n in range(4)]
        on_it = json.loads(opened.text[KEY])["pictures"]  # type: ignore[attr-defined]
    assert columns == [(255, 255, 255), *[(255, 0, 0)] * 3]
    assert [entry["request"] and entry["request"]["steps"] for entry in on_it] == [1] * 4 + [2] * 4 + [None] * 4
    with pytest.raises(UsageError, match="too many for one sheet"):
        SweepSheet(sheet.places[:1] * 99_999, columns=9).check()
    with pytest.raises(UsageError, match="no line has its own number"):
        swept([Line(1, {"prompt": "a", "n": 2})], [parse_axis("steps=1,2")], {}, base_seed=0)


def test_the_sheet_holds_no_settings_where_the_images_hold_none(tmp_path: Path) -> None:
    line = Line(0, {"prompt": "walrus", "model": "tiny"})
    jobs = list(expand([line], {}, load_registry(), num_images=1, base_seed=0))
    sheet = SweepSheet.of(jobs, [parse_axis("steps=1")], num_images=1)
    sheet.write({}, OutputSettings(outdir=tmp_path, metadata=False), Console(quiet=True))
    assert b"walrus" not in (tmp_path / "sweep.png").read_bytes()


@pytest.mark.slow
def test_a_sweep_paints_all_and_a_sheet_of_them(sdcli: Run, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "-m", "tiny", "--outdir", "out", "-q", "--json")
    done = sdcli(*draw, "--sweep", "steps=1,2", "--sweep", "guidance-scale=1..5x3")
    assert done.returncode == 0, done.stderr
    *images, sheet = map(json.loads, done.stdout.splitlines())
    assert len(images) == 6
    assert len({image["seed"] for image in images}) == 1
    assert sheet["status"] == "sheet"
    with Image.open(tmp_path / sheet["path"]) as opened:
        on_it = [entry["request"] for entry in json.loads(opened.text[KEY])["pictures"]]  # type: ignore[attr-defined]
        assert opened.width > opened.height, "three across, two down"
    assert [(one["steps"], one["guidance_scale"]) for one in on_it] == [(s, g) for s in (1, 2) for g in (1, 3, 5)]
    again = sdcli("generate", "--from", images[0]["path"], "--sweep", "seed=1,2", "--outdir", "out", "-q")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "out/sweep-2.png"


def test_a_size_is_swept_as_its_width_and_height_and_conflicts_are_told() -> None:
    (line,) = swept([Line(0, {"prompt": "a"})], [parse_axis("size=64x32")], {"seed": 1}, base_seed=0)
    assert line.fields == {"prompt": "a", "width": 64, "height": 32}
    for axes, typed in ((["size=64x64"], {"width": 8}), (["width=8", "size=64x64"], {})):
        with pytest.raises(UsageError, match=r"width has a value already|swept twice"):
            swept([Line(0, {"prompt": "a"})], list(map(parse_axis, axes)), typed, base_seed=0)


def test_equal_lines_are_swept_with_seeds_of_their_own_whatever_they_are_called() -> None:
    def seeds(lines: list[dict[str, Any]], axis: str, typed: dict[str, Any]) -> list[tuple[int, int]]:
        found = swept([Line(n, fields) for n, fields in enumerate(lines)], [parse_axis(axis)], typed, base_seed=5)
        return [(line.fields["seed"], line.fields.get("variation_seed", 0)) for line in found]

    equal = [{"prompt": "a", "custom_id": "x"}, {"prompt": "a", "custom_id": "y"}]
    a, b, c, d = seeds(equal, "steps=1,2", {})
    assert a == b != c == d
    assert seeds([{"prompt": "a", "seed": None}], "steps=1,2", {}) == [a, b]
    assert seeds([{"prompt": "a"}], "steps=1,2", {}) == [a, b], "an id is no part of what is generated"
    assert seeds([{"prompt": "a"}], "steps=1,2", {"eta": 1.0}) != [a, b]
    one, other = seeds([{"prompt": "a"}], "variation-strength=0.1,0.2", {})
    assert one == other, "the noise that is mixed in is the same, too"
