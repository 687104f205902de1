"""What a training run shows on stderr: a bar on a terminal, few plain lines elsewhere, nothing with -q."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdcli.cli.ui import training_progress
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.training_progress import TrainingProgress, _duration
from sdcli.training.events import (
    CheckpointSaved,
    Event,
    Preparation,
    RunEnd,
    RunNote,
    RunStart,
    SamplesSaved,
    StepMetrics,
    ValidationMetrics,
)
from tests.conftest import REPOSITORY


def trained(step: int, *, steps: int | None = 60) -> StepMetrics:
    return StepMetrics(
        step=step, steps=steps, loss=1 / step, lr=1e-4, grad_norm=1.0, samples_per_second=51.2, waiting=0.021,
        seconds=0.25, memory_bytes=3 << 30,
    )  # fmt: skip


def a_run() -> list[Event]:
    return [
        *(Preparation("examining images", done, 1000) for done in range(0, 1001, 50)),
        RunStart(steps=60, start_step=10, batch=16, parameters=1_000_000, trainable=20_000),
        *(trained(step) for step in range(11, 31)),
        ValidationMetrics(30, {"loss": 0.1234, "psnr": 21.5}),
        CheckpointSaved(30, Path("run/checkpoint-30"), 0.24),
        SamplesSaved(30, [Path("run/samples/step-30.png")]),
        RunNote("a note with \x1b[31m control", warning=False),
        *(trained(step) for step in range(31, 61)),
        RunEnd(60, "finished"),
    ]


def test_without_a_terminal_there_are_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(Console()) as display:
        for event in a_run():
            display.report(event)
    seen = capsys.readouterr()
    assert seen.out == ""
    lines = seen.err.splitlines()
    assert lines[:3] == [
        "examining images: 0 of 1,000",
        "examining images: 1,000 of 1,000",
        "training 20,000 of 1,000,000 parameters, 60 steps of 16 samples, continuing after step 10",
    ]
    assert re.fullmatch(
        r"step 11 of 60: loss 0\.09091, 4\.00 it/s, 51\.2 samples/s, waiting 2%, lr 1\.00e-04, 3\.0 GiB, 0:0\d left",
        lines[3],
    )
    assert lines[4:8] == [
        "step 30: validation loss 0.1234, psnr 21.5",
        "step 30: checkpoint in run/checkpoint-30 (0.2 s)",
        "step 30: samples in run/samples/step-30.png",
        "a note with \N{REPLACEMENT CHARACTER}[31m control",
    ]
    assert lines[8].startswith("step 60 of 60: loss 0.0")
    assert lines[9:] == ["ended after step 60: finished"]


def test_plain_lines_come_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(training_progress.time, "monotonic", lambda: clock[0])
    with TrainingProgress(Console()) as display:
        display.report(RunStart(steps=1000, start_step=0, batch=16, parameters=5, trainable=5))
        for step in range(1, 101):
            clock[0] += 0.5
            display.report(trained(step, steps=1000))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [int(line.split()[1]) for line in lines] == [1, 22, 43, 64, 85]
    assert lines[-1].endswith(f"{_duration(0.5 * 915)} left")


def test_a_run_without_a_number_of_steps_says_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(Console()) as display:
        display.report(RunStart(steps=None, start_step=0, batch=16, parameters=5, trainable=5))
        display.report(trained(1, steps=None))
    seen = capsys.readouterr().err
    assert "5 parameters, until the time is over, steps of 16 samples" in seen
    assert "step 1: loss 1," in seen
    assert "left" not in seen


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(Console(quiet=True)) as display:
        for event in a_run():
            display.report(event)
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_shown_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(Console(quiet=True)) as display:
        display.report(RunNote("the disk is nearly full"))
    assert capsys.readouterr() == ("", "warning: the disk is nearly full\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (754, "12:34"), (5025, "1:23:45"), (273906, "3 d 04:05:06")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


ON_A_TERMINAL = """
import time
from tests.cli.test_training_progress import a_run
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.training_progress import TrainingProgress
console = Console()
with TrainingProgress(console) as display:
    for event in a_run():
        display.report(event)
        time.sleep(0.01)
    console.result("the result")
"""
BAR_OF_GENERATE = """
import time
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import GenerationProgress
from sdcli.generation.events import Phase
console = Console()
with GenerationProgress(console) as display:
    display.phase(Phase("load", (1,), "a model"))
    console.result("the result")
"""


def on_a_terminal(code: str) -> tuple[str, str]:
    """Run code with stderr as a terminal of 80 columns and stdout as a pipe; returns stdout, and stderr's lines."""
    pty = pytest.importorskip("pty")
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True
    )
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(reader)
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(60) == 0, shown
    return out, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_on_a_terminal_a_bar_moves_and_rare_events_stay_above_it() -> None:
    out, shown = on_a_terminal(ON_A_TERMINAL)
    assert out == "the result\n"  # rich's live displays take stdout over, too, when one does not stop them
    assert re.search(r"examining images \S+ 1000/1000", shown)
    assert re.search(r"training \S+ 60/60", shown)
    assert re.search(r"training \S+ \d\d/60 \d:\d\d left", shown)
    assert re.search(r"loss 0\.\d+, 4\.00 it/s, 51\.2 samples/s, waiting 2%, lr 1\.00e-04, 3\.0 GiB", shown)
    for line in ("step 30: validation loss 0.1234, psnr 21.5", "step 30: checkpoint in run/checkpoint-30 (0.2 s)"):
        assert shown.count(line) == 1


@pytest.mark.slow
def test_the_bar_of_generate_leaves_stdout_alone_too() -> None:
    out, shown = on_a_terminal(BAR_OF_GENERATE)
    assert out == "the result\n"
    assert "loading a model" in shown
