"""Trackers: what tensorboard's own reader finds in RUN is what RUN/log.jsonl says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdcli.training.run_log import read_log
from tests.training_runs import captioned_images, same_checkpoint, train_unet

CHANGES: dict[str, Any] = {"checkpointing_steps": 2, "validation_split": 0.4, "validation_steps": 2, "sample_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was tracked, stopped after 2 of 4 steps and resumed; beside it, the same without a tracker."""
    folder = tmp_path_factory.mktemp("tracked")
    data = captioned_images(folder / "pictures")
    train_unet(data, folder / "run", max_train_steps=2, report_to=("tensorboard",), **CHANGES)
    train_unet(data, folder / "run", max_train_steps=4, report_to=("tensorboard",), resume=True, **CHANGES)
    train_unet(data, folder / "plain", max_train_steps=4, **CHANGES)
    return folder / "run"


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from all event files below RUN."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(run.rglob("events.out.tfevents.*"))
    assert files, "no event file"
    found: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


@pytest.mark.slow
def test_tensorboard_reads_the_figures_of_the_log(run: Path) -> None:
    found, log = scalars(run), read_log(run)
    for event, figures in (("train", ("loss", "lr", "grad_norm")), ("validation", ("loss", "loss_level_0"))):
        for figure in figures:
            steps, values = log.series(event, figure)
            assert len(steps) == {"train": 4, "validation": 2}[event]
            written = found[f"{event}/{figure}"]
            assert sorted(written) == steps
            assert [written[step] for step in steps] == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_the_event_files_lie_in_run_and_nowhere_else(run: Path) -> None:
    elsewhere = [file for file in run.parent.rglob("events.out.*") if not file.is_relative_to(run)]
    assert not elsewhere
    inside = [str(file.relative_to(run)) for file in run.rglob("events.out.*")]
    assert inside
    assert not any("checkpoint-" in name for name in inside)


def test_a_tracker_changes_nothing_of_what_is_learnt(run: Path) -> None:
    assert same_checkpoint(run / "checkpoint-4", run.parent / "plain" / "checkpoint-4")


def test_the_settings_are_told_beside_the_event_files(run: Path) -> None:
    """accelerate writes them as hparams.yml."""
    files = sorted(run.rglob("hparams.yml"))
    assert [yaml.safe_load(file.read_text())["max_train_steps"] for file in files] == [2, 4]
    assert yaml.safe_load(files[0].read_text())["train_batch_size"] == 2
