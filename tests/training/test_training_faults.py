"""Whole training runs when a disk, an image, a number or a worker fails: a sentence, and nothing is lost."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sdcli.errors import BadOutput, CannotWrite, NotFound, SdcliError, UsageError
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.events import Event, RunNote, StepMetrics
from sdcli.training.state import checkpoint
from sdcli.training.state.checkpoint import newest_checkpoint, verify_checkpoint
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from sdcli.vae import autoencoder
from tests.conftest import Disk
from tests.faults import WRITING, Call, Hook, failing, nothing, watched
from tests.forked import Forked, run_forked
from tests.training_runs import (
    QUICK,
    captioned_images,
    fresh_accelerator,
    grey_images,
    same_checkpoint,
    train_pixels,
    train_unet,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures")


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "greys")


def train_latents(data: Path, run: Path, *, resume: bool = False, **changes: Any) -> list[Event]:
    """The same with everything that can fail: caches, a frozen VAE and text encoder, averages."""
    full: dict[str, Any] = {
        "validation_split": 0.0, "max_train_steps": 2, "checkpointing_steps": 1, "sample_steps": 1, "use_ema": True,
    }  # fmt: skip
    return train_unet(data, run, resume=resume, **{**full, **changes})


def command(data: Path, run: Path, *more: str) -> list[str]:
    quick = ["--train-batch-size", "2", "--validation-split", "0", "--sample-steps", "1", "-m", "tiny"]
    line = ["train-unet", str(data), "-o", str(run), "--cache-dir", str(data.parent / "cache"), *quick, *more]
    return line


def by_hand(data: Path, run: Path, **changes: Any) -> UnetSession:
    """A prepared session, for tests that do something between steps."""
    fresh_accelerator()
    settings = settings_from(UnetSettings, {**QUICK, "cache_dir": run.parent / "cache", **changes})
    session = UnetSession(str(data), run, settings, load_registry())
    list(session.prepare(resume=False))
    return session


def train_with(session: UnetSession, step: int, do: Callable[[], None]) -> None:
    """Train, and do something after a step."""
    with session:
        for event in session.train(stop=lambda: None):
            if isinstance(event, StepMetrics) and event.step == step:
                do()


def told(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, RunNote))


# Every call that writes


def different(calls: list[Call]) -> list[int]:
    """One call of each sort, by what it does and to which file; of files with numbers the first and the last by turns.

    The checkpoints of a run are written alike, and the network's tensors one after the other.
    """
    sorts: dict[tuple[str, str], list[int]] = {}
    for index, call in enumerate(calls):
        sorts.setdefault((call.kind, re.sub(r"[0-9a-f]{8,}|\d+", "#", str(call.path))), []).append(index)
    return sorted(indices[-(turn % 2)] for turn, indices in enumerate(sorts.values()))


def check_every_fault(root: Path, data: Path, train: Callable[..., list[Event]], *, every: int = 1) -> None:
    """At different calls, or every n-th, the disk is full once; whatever that does, the run can be finished exactly."""
    straight = root / "straight"
    train(data, straight)

    def observe(place: Path, before: Hook) -> tuple[list[Call], Exception | None]:
        """One run in a folder of its own, with its own cache, so that it makes the same calls."""
        place.mkdir()
        with watched(place, before=before, sync=False, also=[(checkpoint, "exchange")]) as calls:
            try:
                train(data, place / "run", cache_dir=place / "cache")
            except Exception as error:
                return calls, error
        return calls, None

    calls, error = observe(root / "all", nothing)
    assert error is None
    assert len(calls) > 100
    refused = 0
    for index in different(calls)[::every]:
        call, place = calls[index], root / str(index)
        how = f"call {index} of {len(calls)}, {call}"
        _, error = observe(place, failing(index, number=errno.ENOSPC, half=call.kind in WRITING))
        assert error is None or isinstance(error, SdcliError), f"{how}: {type(error).__name__}: {error}"
        refused += error is not None
        run = place / "run"
        kept = sorted(run.glob("checkpoint-*"))
        if error is None:
            assert newest_checkpoint(run).step == 2, how
        else:
            assert isinstance(error, CannotWrite), f"{how}: {error}"
            assert "\n" not in str(error), how
        if kept:
            assert newest_checkpoint(run).broken == (), how
        if error is not None:
            try:
                train(data, run, cache_dir=place / "cache", resume=bool(kept))
            except SdcliError as second:
                raise AssertionError(f"{how}: the second time: {second}") from second
        assert same_checkpoint(straight / "checkpoint-2", run / "checkpoint-2"), how
        leftovers = [path for path in place.rglob(".*") if path.name != ".lock"]
        assert not leftovers or call.kind == "unlink", f"{how}: {leftovers}"
        shutil.rmtree(place)
    assert refused > 3


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_call_never_costs_a_bit(tmp_path: Path, greys: Path) -> None:
    check_every_fault(tmp_path, greys, train_pixels)


@pytest.mark.slow
def test_caches_and_frozen_parts_survive_a_full_disk_too(tmp_path: Path, images: Path) -> None:
    check_every_fault(tmp_path, images, train_latents, every=4)


# A disk that fills up


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def train_as_a_command(data: Path, run: Path, *, resume: bool = False) -> None:
    """Three steps by the command line; what it says and ends with becomes an exception as in this process."""
    limits = ["--max-train-steps", "3", "--checkpointing-steps", "1", "--sample-every-n-steps", "1000", "-q"]
    line = command(data, run, *limits, *(["--resume"] if resume else []))
    done = run_forked(line, cwd=data.parent, timeout=240)
    assert "Traceback" not in done.stderr
    if done.returncode == CannotWrite.exit_code:
        raise CannotWrite(done.stderr)
    assert done.returncode == 0, done.stderr


def train_here(data: Path, run: Path, *, resume: bool = False) -> None:
    train_latents(data, run, max_train_steps=3, resume=resume, cache_dir=data.parent / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_here, pytest.param(train_as_a_command, marks=pytest.mark.slow)])
def test_a_disk_that_fills_during_training_is_exit_code_8_and_space_lets_it_go_on(
    tmp_path: Path, images: Path, disk: Disk, train: Callable[..., None]
) -> None:
    straight, run = tmp_path / "straight", disk.path / "run"
    train(images, straight)
    one = size_of(straight / "checkpoint-2")
    disk.resize(size_of(straight) - one // 2)  # the third does not fit

    with pytest.raises(CannotWrite) as caught:
        train(images, run)
    sentence = r"checkpoint-3: No space left on device; a checkpoint of this run takes ([\d.]+) MB"
    needed = re.search(sentence, str(caught.value))
    assert needed is not None, caught.value
    assert float(needed[1]) * 1e6 == pytest.approx(one, rel=0.1)
    found = newest_checkpoint(run)
    assert (found.step, found.broken) == (2, ())
    assert verify_checkpoint(run / "checkpoint-1") is None
    assert (run / "unet" / "config.json").is_file(), "RUN is still a model folder"
    assert not list(run.glob(".sdcli-*"))

    disk.resize(size_of(straight) + 2 * one)
    train(images, run, resume=True)
    assert same_checkpoint(straight / "checkpoint-3", run / "checkpoint-3")


def test_a_run_in_a_folder_that_cannot_be_written_is_a_sentence(greys: Path, disk: Disk) -> None:
    disk.read_only()
    with pytest.raises(CannotWrite, match="Read-only file system") as caught:
        train_pixels(greys, disk.path / "run", cache_dir=greys.parent / "cache")
    assert caught.value.exit_code == 8
    assert str(disk.path / "run") in str(caught.value)
    assert not list(disk.path.iterdir())


def test_a_run_below_a_file_is_a_sentence(tmp_path: Path, greys: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CannotWrite, match="cannot write into"):
            train_pixels(greys, run, cache_dir=tmp_path / "cache")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_the_frozen_parts_have_the_permissions_of_other_files(tmp_path: Path, images: Path) -> None:
    train_latents(images, tmp_path / "run", max_train_steps=1)
    umask = os.umask(0)
    os.umask(umask)
    parts = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {"vae", "text_encoder", "tokenizer", "scheduler"} <= {path.parent.name for path in parts}
    assert {oct(path.stat().st_mode & 0o777) for path in parts} == {oct(0o666 & ~umask)}


# Numbers


@pytest.mark.slow
def test_an_image_whose_latents_are_not_finite_is_dropped_and_told(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = autoencoder.moments

    def moments(vae: Any, pixels: torch.Tensor, **options: Any) -> Any:
        mean, logvar = real(vae, pixels, **options)
        encoded.append(len(pixels))
        return (mean * float("nan") if len(encoded) == 3 else mean), logvar

    encoded: list[int] = []
    monkeypatch.setattr(autoencoder, "moments", moments)
    events = train_unet(images, tmp_path / "run", max_train_steps=2, validation_split=0.0)
    assert re.search(r"dropped \d\.png: its latents are not finite", told(events))
    assert all(np.isfinite(event.loss) for event in events if isinstance(event, StepMetrics))
    facts = newest_checkpoint(tmp_path / "run").facts
    assert (facts["pictures"], facts["dropped"]) == (5, 1)


@pytest.mark.slow
def test_latents_that_go_wrong_in_training_stop_the_run_with_the_images_names(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcli.training.unet import task as unet

    real, calls = unet.moments, itertools.count(1)

    def moments(*arguments: Any, **options: Any) -> Any:
        mean, logvar = real(*arguments, **options)
        return (mean * float("nan") if next(calls) == 4 else mean), logvar

    monkeypatch.setattr(unet, "moments", moments)
    changes = {"max_train_steps": 8, "checkpointing_steps": 2, "cache_latents": False, "validation_split": 0.0}
    with pytest.raises(BadOutput, match=r"loss is nan .* at step 4, with the samples \d\.png, \d\.png;") as caught:
        train_unet(images, tmp_path / "run", **changes)
    assert caught.value.exit_code == 6
    assert newest_checkpoint(tmp_path / "run").step == 2
    monkeypatch.setattr(unet, "moments", real)
    train_unet(images, tmp_path / "run", resume=True, **{**changes, "max_train_steps": 4})
    train_unet(images, tmp_path / "straight", **{**changes, "max_train_steps": 4})
    assert same_checkpoint(tmp_path / "run" / "checkpoint-4", tmp_path / "straight" / "checkpoint-4")


# Images that change under the run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["deleted", "cut short"])
def test_an_image_that_is_gone_in_the_middle_of_a_run_is_a_sentence_with_its_name(
    tmp_path: Path, greys: Path, workers: int, harm: str
) -> None:
    changes: dict[str, Any] = {
        "space": "pixel", "from_scratch": str(tmp_path / "micro.json"), "resolution": "8", "validation_split": 0.0,
        "max_train_steps": 60, "checkpointing_steps": 2, "sample_steps": 1, "model": None,
        "dataloader_num_workers": workers,
    }  # fmt: skip
    session = by_hand(greys, tmp_path / "run", **changes)

    def do_harm() -> None:
        data = (greys / "4.png").read_bytes()
        (greys / "4.png").unlink()
        if harm == "cut short":
            (greys / "4.png").write_bytes(data[:60])

    with pytest.raises(SdcliError) as caught:
        train_with(session, 3, do_harm)
    assert "4.png" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    assert verify_checkpoint(newest_checkpoint(tmp_path / "run").path) is None
    if harm == "deleted":
        assert isinstance(caught.value, NotFound)


# Workers that die


@pytest.fixture
def loader_of_another() -> Iterator[None]:
    """Somebody else's workers in this process: torch has installed its handler of dead children by then."""
    list(DataLoader(range(4), num_workers=1))  # type: ignore[arg-type]
    theirs = signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGCHLD) is theirs, "it was not given back"


@pytest.mark.usefixtures("loader_of_another")
def test_a_worker_that_is_killed_is_a_sentence_and_no_hang(tmp_path: Path, greys: Path) -> None:
    changes: dict[str, Any] = {
        "space": "pixel", "from_scratch": str(tmp_path / "micro.json"), "resolution": "8", "validation_split": 0.0,
        "max_train_steps": 100_000, "checkpointing_steps": 5, "sample_steps": 1, "model": None,
        "dataloader_num_workers": 2, "checkpoints_total_limit": 2,
    }  # fmt: skip
    session = by_hand(greys, tmp_path / "run", **changes)
    killed: list[float] = []

    def kill_a_worker() -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        killed.append(time.monotonic())

    with pytest.raises(SdcliError, match=r"worker process .*--dataloader-num-workers.*--resume") as caught:
        train_with(session, 7, kill_a_worker)
    assert time.monotonic() - killed[0] < 60
    assert "\n" not in str(caught.value)
    for _ in range(100):  # the other worker ends by itself, when it looks for its parent's queue again
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert not multiprocessing.active_children()
    assert newest_checkpoint(tmp_path / "run").broken == ()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_ends_the_command_with_an_exit_code_and_the_run_goes_on_exactly(
    tmp_path: Path, images: Path, workers: int
) -> None:
    online = ["--no-cache-latents", "--dataloader-num-workers", str(workers), "--checkpointing-steps", "2"]
    limits = ["--sample-every-n-steps", "1000000", *online]
    process = Forked(command(images, tmp_path / "run", "--max-train-steps", "100000", *limits, "-q"), cwd=tmp_path)
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= workers
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert "worker process" in error
    assert "Traceback" not in error
    assert "unexpected" not in error
    last = newest_checkpoint(tmp_path / "run").step + 2
    for run, more in ((tmp_path / "run", ["--resume"]), (tmp_path / "straight", [])):
        line = command(images, run, "--max-train-steps", str(last), *limits, *more, "-q")
        done = run_forked(line, cwd=tmp_path, timeout=240)
        assert done.returncode == 0, done.stderr
    assert same_checkpoint(tmp_path / "run" / f"checkpoint-{last}", tmp_path / "straight" / f"checkpoint-{last}")


# What is refused before anything is trained


def test_data_that_vanished_is_a_sentence_at_resume(tmp_path: Path, greys: Path) -> None:
    train_pixels(greys, tmp_path / "run")
    for image in greys.iterdir():
        image.unlink()
    with pytest.raises((NotFound, UsageError), match="greys"):
        train_pixels(greys, tmp_path / "run", resume=True, max_train_steps=3)
    assert newest_checkpoint(tmp_path / "run").step == 2
