"""`sdcli plot`: what is drawn, where it is written, and how it ends without a log or a metric."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.training.plot import COLOURS, Curve, Run, draw_curves, save_figure
from sdcli.training.run_log import RunLog, read_log
from tests.conftest import Run as RunSdcli


def make_run(folder: Path, *, steps: int = 60, seed: int = 0, scale: float = 1.0) -> Path:
    generator = random.Random(seed)
    with RunLog.open(folder) as log:
        log.write("start", start_step=0, steps=steps)
        for step in range(1, steps + 1):
            loss = scale * (0.1 + math.exp(-step / 20)) * math.exp(generator.gauss(0, 0.2))
            log.write("train", step=step, loss=loss, lr=1e-3, grad_norm=1 / step, samples_per_second=50.0)
            if step % 20 == 0:
                log.write("validation", step=step, loss=scale * (0.12 + math.exp(-step / 20)), psnr=float(step))
    return folder


@pytest.fixture(autouse=True)
def _fonts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's list of fonts, made once for all tests."""
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))


def test_one_run_becomes_one_image_and_its_path_is_printed(sdcli: RunSdcli, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = sdcli("plot", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "curves.png\n", "")
    with Image.open(tmp_path / "curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1500, 1000))
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "run"]

    again = sdcli("plot", "run")
    assert again.returncode == 8
    assert "curves.png exists already" in again.stderr
    assert sdcli("plot", "run", "--overwrite").returncode == 0


def test_json_tells_the_last_and_lowest_values(sdcli: RunSdcli, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", scale=2.0)
    done = sdcli("plot", "a", "b", "-o", "both.svg", "--json", "--log-scale", "--smooth", "0")
    assert done.returncode == 0, done.stderr
    (facts,) = map(json.loads, done.stdout.splitlines())
    assert (facts["path"], facts["metric"], [run["run"] for run in facts["runs"]]) == ("both.svg", "loss", ["a", "b"])
    first = facts["runs"][0]
    assert first["step"] == 60
    assert first["validation"] == {
        "last": first["validation"]["lowest"],
        "lowest": 0.12 + math.exp(-3),
        "lowest_at": 60,
    }
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")


def test_each_wrong_wish_ends_with_its_own_code(sdcli: RunSdcli, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    RunLog.open(tmp_path / "fresh").write("start", start_step=0)
    cases = [
        (["absent"], 3, "absent is not a training run"),
        (["run", "absent"], 3, "absent is not a training run"),
        (
            ["run", "--metric", "fid"],
            2,
            "run has no metric 'fid'; it has grad_norm, loss, lr, psnr, samples_per_second",
        ),
        (["fresh"], 2, "fresh has logged no steps yet"),
        (["run", "-o", "curves.gif"], 2, "should end in .png, .svg, .pdf"),
        (["run", "--smooth", "1"], 2, "--smooth"),
    ]
    for arguments, code, sentence in cases:
        done = sdcli("plot", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("curves*"))


def test_a_damaged_log_is_drawn_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdcli.cli.plot import command

    run = make_run(tmp_path / "run")
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'nonsense\n{"event": "train", "st')
    command([run], output=tmp_path / "curves.png")
    seen = capsys.readouterr()
    assert "skipped 2 damaged lines" in seen.err
    assert (tmp_path / "curves.png").is_file()


def test_a_figure_shows_the_values_of_the_log(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run"))
    figure = draw_curves([Run("run", log)], smooth=0.9)
    top, *panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["learning rate", "gradient norm", "samples/s"]
    raw, mean, validation = top.lines
    training = Curve.of(log, "train", "loss")
    assert np.array_equal(raw.get_ydata(), training.values)
    assert np.array_equal(mean.get_ydata(), training.smoothed(0.9).values)
    assert np.array_equal(validation.get_xdata(), [20, 40, 60])
    low, high = top.get_ylim()
    assert low < min(validation.get_ydata()) < max(mean.get_ydata()) < high
    assert np.array_equal(panels[0].lines[0].get_ydata(), np.full(60, 1e-3))


def test_a_metric_of_validation_alone_is_drawn_alone(tmp_path: Path) -> None:
    figure = draw_curves([Run("run", read_log(make_run(tmp_path / "run")))], metric="psnr")
    (line,) = figure.axes[0].lines
    assert np.array_equal(line.get_ydata(), [20, 40, 60])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [" validation"]


def test_many_runs_have_a_colour_or_a_dash_of_their_own(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run"))
    names = [f"run {number}" for number in range(len(COLOURS) + 2)]
    figure = draw_curves([Run(name, log) for name in names])
    shown = figure.axes[0].get_legend()
    looks = {(line.get_color(), line.get_linestyle()) for line in shown.get_lines()[: len(names)]}
    assert len(looks) == len(names)


@pytest.mark.parametrize("log_scale", [False, True])
def test_names_and_values_of_every_kind_can_be_drawn(tmp_path: Path, log_scale: bool) -> None:
    with RunLog.open(tmp_path / "odd") as log:
        for step, loss in enumerate([math.nan, math.inf, 0.0, -1.0, 1e30, 5e-324, math.nan]):
            log.write("train", step=step, loss=loss, lr=0.0, grad_norm=math.nan)
    with RunLog.open(tmp_path / "none") as log:
        log.write("train", step=1, loss=math.nan)
    odd, none = read_log(tmp_path / "odd"), read_log(tmp_path / "none")
    for runs in ([Run("_$x_1$ \u4e2d $", odd), Run("", none)], [Run("$\\frac", none)]):
        figure = draw_curves(runs, log_scale=log_scale)
        save_figure(figure, tmp_path / "odd.png", format="png")
    assert any("_$x_1$" in text.get_text() for text in draw_curves([Run("_$x_1$", odd)] * 2).axes[0].get_legend().texts)


@pytest.mark.slow
def test_equal_logs_give_equal_bytes(tmp_path: Path) -> None:
    log = read_log(make_run(tmp_path / "run"))
    for format in ("png", "svg", "pdf"):
        for name in ("a", "b"):
            save_figure(draw_curves([Run("run", log)]), tmp_path / name, format=format)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_runs_of_equal_names_are_told_apart_by_their_parents() -> None:
    from sdcli.cli.plot import LONGEST_NAME, _names

    assert _names([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert _names([Path("a/run"), Path("a/other\n\x1bname")]) == ["run", "other \N{REPLACEMENT CHARACTER}name"]
    assert _names([Path("a/run"), Path("a/run")]) == ["run", "run"]
    assert _names([Path("x" * 100)]) == ["..." + "x" * (LONGEST_NAME - 3)]
