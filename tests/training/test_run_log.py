"""The log of a run: every line strict JSON, nothing lost to a kill, and an interrupted run reads as a whole one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import CannotWrite, NotFound
from sdcli.training.events import (
    CheckpointSaved,
    Preparation,
    RunEnd,
    RunNote,
    RunStart,
    SamplesSaved,
    StepMetrics,
    ValidationMetrics,
)
from sdcli.training.run_log import MAX_LINE, NAME, Log, RunLog, log_event, read_log
from sdcli.training.smoothing import MovingAverage
from tests.conftest import REPOSITORY


def trained(step: int, loss: float = 0.5) -> StepMetrics:
    return StepMetrics(
        step=step, steps=10, loss=loss, lr=1e-4, grad_norm=1.5, samples_per_second=20.0, waiting=0.1, seconds=0.05,
        memory_bytes=None, figures={"kl": loss / 10}, samples=step * 4,
    )  # fmt: skip


def train(log: RunLog, first: int, last: int, *, every: int = 3) -> None:
    """What the loop writes for the steps first..last, as a pure function of the step."""
    for step in range(first, last + 1):
        log_event(log, trained(step, loss=1 / step))
        if step % every == 0:
            log_event(log, ValidationMetrics(step, {"loss": 2 / step}))
            log_event(log, CheckpointSaved(step, log._path.parent / f"checkpoint-{step}", 0.1))


def started(start_step: int) -> RunStart:
    return RunStart(steps=10, start_step=start_step, batch=4, parameters=100, trainable=50)


def deterministic(log: Log) -> list[dict[str, Any]]:
    """The entries of steps without what differs between two runs of the same."""
    kept = [entry for entry in log.entries if entry["event"] in {"train", "validation", "checkpoint", "end"}]
    return [{key: value for key, value in entry.items() if key not in {"time", "seconds"}} for entry in kept]


def test_what_is_written_is_read_and_every_line_is_strict_json(tmp_path: Path) -> None:
    with RunLog.open(tmp_path / "run") as log:
        log_event(log, Preparation("examining images", 1, 2))
        log_event(log, started(0), settings="abc")
        log_event(log, trained(1, loss=math.nan))
        log_event(log, trained(2, loss=-math.inf))
        log_event(log, SamplesSaved(2, [tmp_path / "run" / "samples" / "a.png", Path("/elsewhere/b.png")]))
        log_event(log, RunNote("a note\nof two lines, with \ud800"))
        log_event(log, RunEnd(2, "all steps are done"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    lines = (tmp_path / "run" / NAME).read_text().splitlines()
    entries = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [entry["event"] for entry in entries] == ["start", "train", "train", "sample", "note", "end"]
    assert entries[0]["settings"] == "abc"
    assert entries[0]["versions"]["torch"]
    assert (entries[1]["loss"], entries[2]["loss"]) == ("NaN", "-Infinity")
    assert "memory_bytes" not in entries[1]
    assert entries[3]["paths"] == ["samples/a.png", "/elsewhere/b.png"]
    read = read_log(tmp_path / "run")
    assert read.damaged == 0
    steps, values = read.series("train", "loss")
    assert steps == [1, 2]
    assert math.isnan(values[0])
    assert values[1] == -math.inf
    assert read.series("train", "samples") == ([1, 2], [4.0, 8.0])
    assert {"loss", "kl", "lr", "grad_norm"} < set(read.metrics("train"))
    assert not {"step", "time", "event"} & set(read.metrics("train"))


@pytest.mark.slow
@given(stops=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
def test_an_interrupted_and_resumed_run_reads_as_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    with RunLog.open(folder / "whole") as log:
        log_event(log, started(0))
        train(log, 1, 10)
        log_event(log, RunEnd(10, "all steps are done"))
    done = 0
    for stop, back in [*stops, (10, 0)]:
        with RunLog.open(folder / "parts") as log:
            log_event(log, started(done))
            train(log, done + 1, stop)
            if stop == 10 or stop % 2:
                log_event(log, RunEnd(stop, "all steps are done" if stop == 10 else "interrupted"))
        done = min(back, max(done, stop))  # the checkpoint that the next process goes on from
    whole, parts = read_log(folder / "whole"), read_log(folder / "parts")
    assert deterministic(parts) == deterministic(whole)
    for name in whole.metrics("train"):
        assert parts.series("train", name) == whole.series("train", name)


def test_a_resume_line_alone_rewinds_too_and_keeps_the_notes(tmp_path: Path) -> None:
    with RunLog.open(tmp_path) as log:
        train(log, 1, 7)
        log_event(log, RunNote("kept"))
        log.rewind(4)
        train(log, 5, 6)
    read = read_log(tmp_path)
    assert read.series("train", "loss")[0] == [1, 2, 3, 4, 5, 6]
    assert read.series("validation", "loss")[0] == [3, 6]
    assert [entry["text"] for entry in read.of("note")] == ["kept"]


def test_every_torn_last_line_is_passed_over_and_the_next_write_starts_afresh(tmp_path: Path) -> None:
    with RunLog.open(tmp_path) as log:
        train(log, 1, 2)
    path = tmp_path / NAME
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        torn = cut < len(whole) - 1  # with only its end of line missing, the entry itself is whole
        assert read_log(tmp_path).series("train", "loss")[0] == ([1] if torn else [1, 2])
        with RunLog.open(tmp_path) as log:
            train(log, 2, 2)
        read = read_log(tmp_path)
        assert read.series("train", "loss") == ([1, 2], [1.0, 0.5])
        assert read.damaged == int(torn)


def test_a_killed_writer_loses_no_line_that_it_had_written(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom sdcli.training.run_log import RunLog\n"
        f"log = RunLog.open(Path({str(tmp_path)!r}))\n"
        "for step in range(1, 1 << 30):\n"
        "    log.write('train', step=step, loss=1.0)\n    print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True)
    assert writer.stdout is not None
    said = [int(writer.stdout.readline()) for _ in range(200)]
    os.kill(writer.pid, signal.SIGKILL)
    said += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    with RunLog.open(tmp_path) as log:
        log.rewind(said[-1])
        log.write("train", step=said[-1] + 1, loss=2.0)
    steps, _ = read_log(tmp_path).series("train", "loss")
    assert steps == [*range(1, said[-1] + 2)]


HOSTILE = [
    b"", b"null", b"[]", b'"text"', b"{}", b'{"event": 5}', b'{"event": "train"}', b'{"event": "train", "step": "1"}',
    b'{"event": "train", "step": -1, "loss": 9}', b'{"event": "train", "step": true, "loss": 9}',
    b'{"event": "train", "step": 1.5, "loss": 9}', b'{"event": "resume", "step": null}', b'{"event": "start"}',
    b"[" * 100_000, b"\xff\xfe\x00", b'{"event": "train", "step": 1' + b"0" * 10_000 + b', "loss": 9}',
    b'{"event": "train", "step": 9223372036854775808, "loss": 9}',
    b'{"event": "train", "step": 2, "loss": "' + b"x" * (2 * MAX_LINE) + b'"}',
]  # fmt: skip


def test_damaged_and_hostile_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    good = b'{"event": "train", "step": 5, "loss": 0.5}'
    (tmp_path / NAME).write_bytes(b"\n".join([line for bad in HOSTILE for line in (bad, good)]) + b"\n")
    read = read_log(tmp_path)
    assert read.series("train", "loss") == ([5], [0.5])
    assert read.damaged == len(HOSTILE) - 1  # all but the empty line


def test_values_that_are_no_numbers_are_no_series(tmp_path: Path) -> None:
    huge = b"1" + b"0" * 400
    entry = b'{"event": "train", "step": 1, "a": "text", "b": true, "c": null, "d": [1], "e": NaN, "f": ' + huge + b"}"
    (tmp_path / NAME).write_bytes(entry)
    read = read_log(tmp_path)
    assert read.metrics("train") == ["e", "f"]
    assert read.series("train", "f") == ([1], [math.inf])
    assert read.series("train", "a") == ([], [])


@given(st.binary(max_size=300))
def test_no_bytes_at_all_make_reading_fail(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / NAME).write_bytes(data)
    read_log(folder)


def test_a_folder_without_a_log_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"is not a training run: there is no .*log\.jsonl"):
        read_log(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound):
        read_log(tmp_path / "file")


def test_a_log_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        RunLog.open(tmp_path / "file" / "run")
    with RunLog.open(tmp_path / "run") as log:
        log.write("train", step=1, loss=1.0)
        full = os.write

        def half(descriptor: int, data: bytes) -> int:
            return full(descriptor, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(CannotWrite, match="No space left"):
            log.write("train", step=2, loss=1.0)
        monkeypatch.undo()
        log.write("train", step=3, loss=1.0)
        log.sync()
    read = read_log(tmp_path / "run")
    assert read.series("train", "loss")[0] == [1, 3]
    assert read.damaged == 1


def test_the_moving_average_has_no_bias_and_passes_over_what_is_not_finite() -> None:
    average = MovingAverage(0.9)
    assert math.isnan(average.add(math.nan))
    assert [average.add(3.0) for _ in range(5)] == pytest.approx([3.0] * 5)
    assert average.add(math.inf) == pytest.approx(3.0)
    values = [0.3, 1.7, -2.0, 0.4]
    average = MovingAverage(0.9)
    mean = [average.add(value) for value in values][-1]
    weights = [0.9 ** (len(values) - 1 - index) for index in range(len(values))]
    assert mean == pytest.approx(sum(map(float.__mul__, weights, values)) / sum(weights))
    plain = MovingAverage(0.0)
    assert [plain.add(value) for value in values] == values
