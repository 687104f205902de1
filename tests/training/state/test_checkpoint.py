"""Checkpoints: nothing is ever lost, whichever call fails or is the last, and nothing broken is ever trusted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from sdcli.errors import BadOutput, CannotWrite, Interrupted, NotFound
from sdcli.io.files import exchange
from sdcli.models.loader import load_model
from sdcli.models.registry import spec_of_folder
from sdcli.training.state import checkpoint, manifest
from sdcli.training.state.checkpoint import newest_checkpoint, save_checkpoint, verify_checkpoint
from sdcli.training.state.manifest import MANIFEST, Manifest
from sdcli.training.state.model_links import current_checkpoint, link_model_folder
from sdcli.training.state.run_lock import run_lock
from sdcli.training.state.state_files import check_finite, read_state, write_tensors
from tests.conftest import REPOSITORY, Disk
from tests.faults import (
    DIED,
    WRITING,
    Call,
    Hook,
    PowerLoss,
    dying,
    failing,
    full_from,
    in_a_child,
    materialize,
    temporary_of,
    watched,
)

WATCH = {"sync": False, "also": [(checkpoint, "exchange")]}


def state(value: int) -> Callable[[Path], None]:
    """Something like a trainer's checkpoint, whose every file tells its value."""
    tensors = {"weight": torch.full((16,), float(value)), "bias": torch.full((3,), float(value))}

    def write(folder: Path) -> None:
        for part in ("unet", "unet_ema"):
            write_tensors(folder / part / "diffusion_pytorch_model.safetensors", tensors)
            (folder / part / "config.json").write_text(json.dumps({"value": value}))
        write_tensors(folder / "state" / "optimizer.safetensors", tensors)
        (folder / "train_state.json").write_text(json.dumps({"value": value}))

    return write


def value_of(path: Path) -> int:
    """The value that all files of a checkpoint tell alike."""
    values = {json.loads((path / name).read_text())["value"] for name in ("unet/config.json", "train_state.json")}
    for name in ("unet/diffusion_pytorch_model", "unet_ema/diffusion_pytorch_model", "state/optimizer"):
        tensors, _ = read_state(path / f"{name}.safetensors")
        values |= {int(number) for tensor in tensors.values() for number in tensor}
    assert len(values) == 1, "files of two checkpoints are mixed"
    return values.pop()


def save(run: Path, step: int, value: int | None = None, *, keep: int | None = None, **more: Any) -> Path:
    return save_checkpoint(run, step, state(step if value is None else value), facts={"seed": 7}, keep=keep, **more)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def hidden(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run) if name.startswith(".") and name != ".lock")


def break_file(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    for step in (10, 20, 30):
        save(tmp_path / "run", step)
    return tmp_path / "run"


# What a save makes


def test_a_checkpoint_is_found_again_with_its_files_and_facts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a" / "run", 5, state(3), facts={"torch": "2.13", "at": (1, 2.5)}, keep=None)
    found = newest_checkpoint(tmp_path / "a" / "run")
    assert (found.path, found.step, found.broken) == (path, 5, ())
    assert found.facts == {"torch": "2.13", "at": [1, 2.5]}
    assert value_of(found.path) == 3
    assert path.name == "checkpoint-5"
    assert os.readlink(tmp_path / "a" / "run" / "current") == "checkpoint-5"
    assert current_checkpoint(tmp_path / "a" / "run") == path
    assert verify_checkpoint(path) is None
    assert not hidden(tmp_path / "a" / "run")


def test_the_manifest_names_every_file_with_its_size_and_sha256(run: Path) -> None:
    manifest = json.loads((run / "checkpoint-30" / MANIFEST).read_text())
    files = {p.relative_to(run / "checkpoint-30").as_posix() for p in (run / "checkpoint-30").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
    sums = "".join(f"{entry['sha256']}  {name}\n" for name, entry in manifest["files"].items())
    subprocess.run(["sha256sum", "-c", "--quiet"], input=sums, text=True, cwd=run / "checkpoint-30", check=True)


def test_newest_means_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).step == 100
    assert current_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_where_there_is_no_checkpoint_it_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotFound, match="no checkpoint in"):
            newest_checkpoint(folder)
    assert current_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()} == {mode}


def test_facts_that_are_no_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for facts, error in (({"a": {1, 2}}, TypeError), ({"a": float("nan")}, ValueError)):
        with pytest.raises(error):
            save_checkpoint(tmp_path, 1, lambda folder: pytest.fail("it was written"), facts=facts, keep=None)
    assert not os.listdir(tmp_path)


def test_an_exception_while_writing_leaves_no_trace(run: Path) -> None:
    def write(folder: Path) -> None:
        state(40)(folder)
        raise error

    for error in (
        BadOutput("weights are NaN"),
        KeyboardInterrupt(),
        Interrupted("interrupted"),
        SafetensorError("a mistake of the caller"),
    ):
        with pytest.raises(type(error)):
            save_checkpoint(run, 40, write, facts={}, keep=2)
        assert steps(run) == [10, 20, 30]
        assert not hidden(run)
        assert value_of(run / "current") == 30


def test_a_link_inside_a_checkpoint_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        save_checkpoint(tmp_path, 1, lambda folder: (folder / "a").symlink_to("/etc"), facts={}, keep=None)
    assert not steps(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64])
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype) -> None:
    good = torch.ones(5, dtype=torch.float32).to(dtype)
    check_finite({"a": good, "ids": torch.tensor([2**62]), "none": torch.zeros(0, dtype=dtype)})
    for bad in (float("nan"), float("inf")):
        wrong = torch.tensor([1.0, bad]).to(dtype)
        with pytest.raises(BadOutput, match=r"1 of 2 .* first b;"):
            check_finite({"a": good, "b": wrong})


# Pruning


def test_only_as_many_as_asked_for_stay_and_the_oldest_go(run: Path) -> None:
    save(run, 40, keep=2)
    assert steps(run) == [30, 40]
    save(run, 50, keep=1)
    assert steps(run) == [50]
    save(run, 60, keep=None)
    assert steps(run) == [50, 60]


def test_nothing_is_deleted_before_the_new_one_is_whole_and_current(run: Path) -> None:
    deleted: list[Call] = []

    def look(index: int, call: Call) -> None:
        gone = call.kind in {"unlink", "rmdir"} or (call.kind == "rename" and call.path.name.startswith("checkpoint-"))
        if gone and not call.path.name.startswith("."):
            deleted.append(call)
            assert verify_checkpoint(run / "checkpoint-40") is None
            assert current_checkpoint(run) == run / "checkpoint-40"

    with watched(run, before=look, **WATCH):
        save(run, 40, keep=1)
    assert steps(run) == [40]
    assert len(deleted) > 10


def test_broken_checkpoints_are_told_and_never_deleted_nor_counted(run: Path) -> None:
    (run / "checkpoint-10" / "train_state.json").unlink()
    break_file(run / "checkpoint-20" / "train_state.json")  # of the right size: found out just before it is deleted
    told: list[tuple[str, str]] = []
    save(run, 40, keep=2, report=lambda path, reason: told.append((path.name, reason)))
    save(run, 50, keep=2)
    assert steps(run) == [10, 20, 40, 50]
    assert [name for name, _ in told] == ["checkpoint-10", "checkpoint-20"]
    assert "lacks 'train_state.json'" in told[0][1]
    assert "SHA-256" in told[1][1]


def test_the_newest_whole_one_is_kept_even_if_it_is_of_a_later_step(run: Path) -> None:
    save(run, 15, keep=1)
    assert steps(run) == [15, 30]
    assert current_checkpoint(run) == run / "checkpoint-15"


def test_a_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(run: Path) -> None:
    def refuse(index: int, call: Call) -> None:
        if call.kind in {"unlink", "rmdir"} and call.path.exists():
            raise OSError(errno.EACCES, "Permission denied")

    with watched(run, before=refuse, **WATCH):
        save(run, 40, keep=2)
    assert newest_checkpoint(run).step == 40
    assert steps(run) == [30, 40]
    assert hidden(run)
    save(run, 50, keep=2)
    assert not hidden(run)


def test_folders_of_dead_processes_are_swept_and_those_of_the_living_are_not(run: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process in (dead.pid, dead.pid, os.getpid()):
        folder = temporary_of(process, run) / "unet"
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    temporary_of(dead.pid, run).symlink_to("checkpoint-7")
    living, foreign = temporary_of(os.getppid(), run), run / ".checkpoint-x.tmp-1a"
    living.mkdir()
    foreign.mkdir()
    save(run, 40)
    assert hidden(run) == sorted([living.name, foreign.name])


# The same step again


def test_the_same_checkpoint_again_keeps_the_first(run: Path) -> None:
    before = (run / "checkpoint-30" / "train_state.json").stat().st_ino
    (run / "current").unlink()
    save(run, 30)
    assert (run / "checkpoint-30" / "train_state.json").stat().st_ino == before
    assert current_checkpoint(run) == run / "checkpoint-30"
    assert not hidden(run)


@pytest.mark.parametrize("swaps", [True, False])
def test_another_checkpoint_of_the_same_step_replaces_the_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    save(run, 30, value=31)
    assert value_of(run / "checkpoint-30") == value_of(run / "current") == 31
    assert steps(run) == [10, 20, 30]
    assert not hidden(run)


def test_a_broken_checkpoint_of_the_same_step_is_kept_under_another_name(run: Path) -> None:
    told: list[Path] = []
    for number in range(2):
        break_file(run / "checkpoint-30" / "train_state.json")
        broken = (run / "checkpoint-30" / "train_state.json").read_bytes()
        save(run, 30, value=31 + number, keep=1, report=lambda path, reason: told.append(path))
        assert value_of(run / "checkpoint-30") == 31 + number
        assert (told[-1] / "train_state.json").read_bytes() == broken
    assert [path.name for path in told] == ["checkpoint-30.broken", "checkpoint-30.broken-2"]
    assert newest_checkpoint(run).broken == ()


# Broken ones


def test_a_broken_checkpoint_is_passed_over_named_and_left(run: Path) -> None:
    break_file(run / "checkpoint-30" / "state" / "optimizer.safetensors")
    shutil.rmtree(run / "checkpoint-20" / "unet")
    found = newest_checkpoint(run)
    assert found.step == 10
    assert [(path.name, reason) for path, reason in found.broken] == [
        (
            "checkpoint-30",
            "is damaged: 'state/optimizer.safetensors' has changed (its SHA-256 differs)",
        ),
        ("checkpoint-20", "lacks 'unet/config.json', which its manifest lists"),
    ]
    (run / "checkpoint-10" / "extra").write_text("")
    with pytest.raises(
        NotFound, match=r"no complete checkpoint .*checkpoint-30 is damaged.*checkpoint-10 holds 'extra'"
    ):
        newest_checkpoint(run)
    assert steps(run) == [10, 20, 30]


def signed(text: str) -> bytes:
    """A manifest whose digest is right, whatever is in it."""
    content = json.loads(text)
    return Manifest(content["step"], content["files"], content["facts"]).as_bytes()


ENTRY = '{"size": 5, "sha256": "00"}'
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "no fields": b"{}",
    "NaN": b'{"schema": 1, "step": NaN, "files": {}, "facts": {}}',
    "nested": b"[" * 200_000,
    "nested well": b'{"schema":1,"step":30,"files":{},"facts":{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}}",
    "a long number": b'{"schema": 1, "step": ' + b"9" * 10_000 + b', "files": {}, "facts": {}}',
    "infinite": b'{"schema": 1, "step": 1e999, "files": {}, "facts": {}}',
    "no digest": b'{"schema": 1, "step": 30, "files": {}, "facts": {}}',
    "another schema": b'{"schema": 2, "step": 30, "files": {}, "facts": {}}',
    "utf-16": '{"schema": 1, "step": 30, "files": {}, "facts": {}}'.encode("utf-16"),
    "no utf-8": b'{"schema": "\xff\xfe"}',
    "a list of files": b'{"schema": 1, "step": 30, "files": [], "facts": {}}',
    "no sizes": b'{"schema": 1, "step": 30, "files": {"a": 1}, "facts": {}}',
    "out of the folder": signed(f'{{"step": 30, "files": {{"../../secret": {ENTRY}}}, "facts": {{}}}}'),
    "absolute": signed(f'{{"step": 30, "files": {{"/etc/passwd": {ENTRY}}}, "facts": {{}}}}'),
    "itself": signed(f'{{"step": 30, "files": {{"manifest.json": {ENTRY}}}, "facts": {{}}}}'),
    "NUL": signed(f'{{"step": 30, "files": {{"a\\u0000b": {ENTRY}}}, "facts": {{}}}}'),
    "a surrogate": signed(f'{{"step": 30, "files": {{"\\ud800": {ENTRY}}}, "facts": {{}}}}'),
    "no files": signed('{"step": 30, "files": {}, "facts": {}}'),
    "another step": signed('{"step": 31, "files": {}, "facts": {}}'),
    "a long name": signed(f'{{"step": 30, "files": {{"{"x" * 100_000}": {ENTRY}}}, "facts": {{}}}}'),
    "huge": b" " * (manifest.MAX_MANIFEST_BYTES + 1),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_a_reason_and_no_crash(run: Path, kind: str) -> None:
    (run.parent / "secret").write_text("12345")
    (run / "checkpoint-30" / MANIFEST).write_bytes(HOSTILE[kind])
    started = time.monotonic()
    reason = verify_checkpoint(run / "checkpoint-30")
    assert reason
    assert len(reason) < 300
    assert time.monotonic() - started < 2
    assert newest_checkpoint(run).step == 20


def test_what_is_no_ordinary_file_is_a_reason_and_is_not_opened(run: Path) -> None:
    inside = run / "checkpoint-30"
    (inside / "train_state.json").rename(run.parent / "elsewhere.json")
    (inside / "train_state.json").symlink_to(run.parent / "elsewhere.json")
    assert "'train_state.json', which is not a regular file" in str(verify_checkpoint(inside))
    (inside / "train_state.json").unlink()
    os.mkfifo(inside / "train_state.json")
    assert "not a regular file" in str(verify_checkpoint(inside))
    (inside / MANIFEST).unlink()
    os.mkfifo(inside / MANIFEST)
    assert "not a file, or too large" in str(verify_checkpoint(inside))
    shutil.rmtree(inside)
    assert "is not a folder" in str(verify_checkpoint(inside))
    inside.write_text("")
    assert newest_checkpoint(run).broken == ((inside, "is not a folder"),)
    inside.unlink()
    inside.symlink_to(run / "checkpoint-30")
    assert newest_checkpoint(run).step == 20


def test_another_tools_checkpoint_is_passed_over(run: Path) -> None:
    (run / "checkpoint-40").mkdir()
    (run / "checkpoint-40" / "optimizer.bin").write_bytes(b"pickle")
    for name in ("checkpoint-x", "checkpoint-050", "checkpoint-60.broken", "checkpoint-99999999999999999999"):
        (run / name).mkdir()
    found = newest_checkpoint(run)
    assert found.step == 30
    assert [(path.name, reason.split(":")[0]) for path, reason in found.broken] == [
        ("checkpoint-40", "has no manifest.json")
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1)
    save(folder, 2)
    return folder


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flipped_byte_and_any_truncation_of_any_file_is_noticed(two: Path, data: st.DataObject) -> None:
    files = sorted(path for path in (two / "checkpoint-2").rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole) - 1))
        flip = data.draw(st.integers(1, 255))
        broken = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    else:
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    file.write_bytes(broken)
    try:
        found = newest_checkpoint(two)
        assert found.step == 1
        assert [path for path, _ in found.broken] == [two / "checkpoint-2"]
    finally:
        file.write_bytes(whole)
    assert newest_checkpoint(two).step == 2


# Faults at every call


@dataclass(frozen=True)
class Situation:
    """A run as it is before a save, the save, and what of it may be found afterwards."""

    prepare: Callable[[Path], None]
    save: Callable[[Path], Path]
    values: frozenset[int]
    """What `value_of` the newest checkpoint may be at any moment."""
    survivor: str = ""
    """A checkpoint that stays whole throughout, or turns into the one that replaces it."""
    current: bool = True
    """Whether RUN/current leads to a whole checkpoint at every moment."""


def three(run: Path) -> None:
    for step in (10, 20, 30):
        save(run, step)


def with_left_overs(run: Path) -> None:
    three(run)
    dead = subprocess.Popen(["true"])
    dead.wait()
    shutil.copytree(run / "checkpoint-30", temporary_of(dead.pid, run))
    temporary_of(dead.pid, run).symlink_to("checkpoint-30")


def with_a_broken_one(run: Path) -> None:
    three(run)
    break_file(run / "checkpoint-30" / "train_state.json")


NEXT = Situation(three, lambda run: save(run, 40, keep=2), frozenset({30, 40}), "checkpoint-30")
SITUATIONS = {
    "the fourth of two": NEXT,
    "the only one": Situation(three, lambda run: save(run, 40, keep=1), frozenset({30, 40})),
    "the first": Situation(
        lambda run: run.mkdir(parents=True), lambda run: save(run, 40, keep=2), frozenset({40}), current=False
    ),
    "after a crash": replace(NEXT, prepare=with_left_overs),
    "the same again": Situation(three, lambda run: save(run, 30, keep=2), frozenset({30}), "checkpoint-30"),
    "another of that step": Situation(
        three, lambda run: save(run, 30, 31, keep=2), frozenset({30, 31}), "checkpoint-30"
    ),
    "in the place of a broken one": Situation(
        with_a_broken_one, lambda run: save(run, 30, 31, keep=2), frozenset({20, 31}), "checkpoint-20", current=False
    ),
}
QUICK = "the fourth of two"
by_situation = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in SITUATIONS]
)


class Stage:
    """A situation that is played many times, each time in a fresh copy."""

    def __init__(self, folder: Path, situation: Situation) -> None:
        self.situation = situation
        self.template, self.count, self.folder = folder / "template", 0, folder
        situation.prepare(self.template)
        checkpoints = self.template.glob("checkpoint-*")
        self.broken = {path.name for path in checkpoints if verify_checkpoint(path) is not None}

    def fresh(self) -> Path:
        self.count += 1
        return Path(shutil.copytree(self.template, self.folder / f"run-{self.count}", symlinks=True))

    def calls(self) -> list[Call]:
        run = self.fresh()
        with watched(run, **WATCH) as calls:
            self.situation.save(run)
        return calls

    def check(self, run: Path, *, finished: bool = False) -> None:
        """What must hold at any moment, and that the next save puts everything right; the run is deleted."""
        self.look(run, finished=finished)
        with watched(run, **WATCH):
            save(run, 50, keep=2)
        assert newest_checkpoint(run).step == 50
        assert value_of(run / "current") == 50
        assert len([path for path in run.glob("checkpoint-*") if verify_checkpoint(path) is None]) <= 2
        assert not hidden(run)
        shutil.rmtree(run)

    def look(self, run: Path, *, finished: bool = False) -> None:
        """What must hold at any moment."""
        situation = self.situation
        first = not any(self.template.glob("checkpoint-*"))
        values = {max(situation.values)} if finished else situation.values
        if finished or not first or list(run.glob("checkpoint-*")):
            found = newest_checkpoint(run)
            assert value_of(found.path) in values
        broken = {path.name for path in run.glob("checkpoint-*[0-9]") if verify_checkpoint(path) is not None}
        assert broken <= self.broken, "one that is only in part there has a checkpoint's name"
        if situation.survivor:
            assert (run / situation.survivor).is_dir()
        if finished or situation.current:
            assert verify_checkpoint(run / os.readlink(run / "current")) is None
            assert value_of(run / "current") in values

    def play(self, run: Path, hook: Hook) -> bool:
        """Save under a fault; True when the save ended well, and its error is CannotWrite otherwise."""
        with watched(run, before=hook, **WATCH):
            try:
                self.situation.save(run)
            except CannotWrite:
                return False
        return True


@by_situation
def test_whichever_call_fails_nothing_is_lost(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path, SITUATIONS[name])
    calls = stage.calls()
    assert {call.kind for call in calls} >= {"open", "mkdir", "save_file", "fsync", "write", "close", "chmod"}
    refused = 0
    for index, call in enumerate(calls):
        for number, half in ((errno.EIO, False), (errno.ENOSPC, True))[: 1 + (call.kind in WRITING)]:
            run = stage.fresh()
            finished = stage.play(run, failing(index, number=number, half=half))
            refused += not finished
            if not finished and call.kind not in {"unlink", "rmdir"}:
                assert not list(run.glob(f".sdcli-*-{os.getpid()}-*-checkpoint-*.tmp"))
            stage.check(run, finished=finished)
    assert refused > 20


@pytest.mark.slow
@by_situation
def test_a_disk_that_is_full_from_any_call_on_loses_nothing(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path, SITUATIONS[name])
    for index in range(len(stage.calls())):
        run = stage.fresh()
        stage.check(run, finished=stage.play(run, full_from(index)))


@by_situation
@pytest.mark.slow
def test_a_process_that_dies_at_any_call_loses_nothing(tmp_path: Path, name: str) -> None:
    """At every third call outside of the first situation: a power failure that loses nothing leaves the same files."""
    stage = Stage(tmp_path, SITUATIONS[name])
    place = list(SITUATIONS).index(name)
    for index, call in list(enumerate(stage.calls()))[place % 3 :: 1 if name == QUICK else 3]:
        for half in (False, True)[: 1 + (call.kind in WRITING)]:
            run = stage.fresh()
            assert in_a_child(partial(stage.play, run, dying(index, half=half))) == DIED
            stage.check(run)


@pytest.mark.slow
def test_without_an_atomic_exchange_a_reader_still_finds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    situation = SITUATIONS["another of that step"]
    stage = Stage(tmp_path, replace(situation, survivor="", current=False))
    calls = stage.calls()
    assert "exchange" in {call.kind for call in calls}
    for index in [*range(0, len(calls), 2), *(index for index, call in enumerate(calls) if call.kind == "exchange")]:
        run = stage.fresh()
        assert in_a_child(partial(stage.play, run, dying(index))) == DIED
        stage.check(run)


# Power failures


@by_situation
def test_a_power_failure_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    situation = SITUATIONS[name]
    stage = Stage(tmp_path, situation)
    run = stage.fresh()
    disk = PowerLoss(run, luck=2 if name == QUICK else 6)
    with watched(run, after=disk.follow, **WATCH) as calls:
        situation.save(run)
    assert len(calls) > 20
    assert len(disk.states) > 20
    for number, (tree, how) in enumerate(disk.states.values()):
        left = tmp_path / f"left-{number}"
        materialize(tree, left)
        try:
            (stage.look if number % 8 else stage.check)(left)
        except Exception as error:
            raise AssertionError(how) from error
    materialize(disk.certain(), tmp_path / "certain")
    stage.check(tmp_path / "certain", finished=True)


@pytest.mark.slow
@pytest.mark.parametrize("omitted", ["files", "the folder", "RUN"])
def test_the_model_of_a_disk_notices_a_missing_fsync(tmp_path: Path, omitted: str) -> None:
    stage = Stage(tmp_path, NEXT)
    run = stage.fresh()
    disk = PowerLoss(run, luck=2)

    def forgetful(index: int, call: Call) -> None:
        kind = "RUN" if call.path == run else "the folder" if call.path.is_dir() else "files"
        if call.kind != "fsync" or kind != omitted:
            disk.follow(index, call)

    with watched(run, after=forgetful, **WATCH):
        NEXT.save(run)
    for number, (tree, _) in enumerate(disk.states.values()):
        materialize(tree, tmp_path / f"left-{number}")
        try:
            stage.look(tmp_path / f"left-{number}")
        except Exception:
            return
    pytest.fail("every state was fine")


# Real disks and real kills


def large(value: int, count: int = 25_000) -> Callable[[Path], None]:
    """A checkpoint with two files of 100 kB."""
    tensors = {"weight": torch.full((count,), float(value))}

    def write(folder: Path) -> None:
        state(value)(folder)
        write_tensors(folder / "one.safetensors", tensors)
        write_tensors(folder / "two.safetensors", tensors)

    return write


@pytest.mark.parametrize("left", [0, 1, 4096, 20_000, 60_000, 110_000, 200_000])
def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(disk: Disk, left: int) -> None:
    disk.resize(1 << 20)
    run = disk.path / "run"
    save_checkpoint(run, 1, large(1), facts={}, keep=1)
    free = shutil.disk_usage(disk.path).free
    (disk.path / "fill").write_bytes(bytes(max(free - left, 0) // 4096 * 4096))
    for _ in range(2):
        with pytest.raises(CannotWrite) as caught:
            save_checkpoint(run, 2, large(2), facts={}, keep=1)
        assert "No space left on device; a checkpoint of this run takes 0.2 MB or more" in str(caught.value)
        assert caught.value.exit_code == 8
        assert not hidden(run)
        assert value_of(newest_checkpoint(run).path) == value_of(run / "current") == 1
    (disk.path / "fill").unlink()
    save_checkpoint(run, 2, large(2), facts={}, keep=1)
    assert steps(run) == [2]


def test_a_file_size_limit_is_a_sentence_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1), facts={}, keep=1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(CannotWrite, match="File too large; a checkpoint of this run takes"):
            save_checkpoint(tmp_path, 2, large(2), facts={}, keep=1)

    assert in_a_child(limited) == 0
    assert not hidden(tmp_path)
    assert value_of(newest_checkpoint(tmp_path).path) == 1


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CannotWrite, match="cannot write"):
            save(run, 1)
        with pytest.raises(CannotWrite, match="cannot write"), run_lock(run):
            pass


@pytest.mark.slow
def test_random_kills_inside_saves_of_20_mb_lose_nothing_that_was_reported(tmp_path: Path) -> None:
    chance = random.Random(0)
    run = tmp_path / "run"
    began = time.monotonic()
    save_checkpoint(run, 0, large(0, 2_500_000), facts={}, keep=2)
    longest = max(0.4, 4 * (time.monotonic() - began))  # so that a slow machine finishes some saves, too
    reported, inside = 0, 0
    for _ in range(60):
        reader, writer = os.pipe()

        def saving(writer: int = writer) -> None:
            with run_lock(run):
                found = newest_checkpoint(run)
                assert value_of(found.path) == found.step
                step = found.step
                while True:
                    step += 1
                    save_checkpoint(run, step, large(step, 2_500_000), facts={}, keep=2)
                    os.write(writer, b".")

        child = os.fork()
        if child == 0:
            try:
                saving()
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(chance.uniform(0.01, longest))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        done = os.read(reader, 10_000) if select.select([reader], [], [], 0)[0] else b""
        os.close(reader)
        found = newest_checkpoint(run)
        assert found.step >= reported + len(done)
        assert found.broken == ()
        assert value_of(found.path) == found.step
        assert verify_checkpoint(run / os.readlink(run / "current")) is None
        inside += bool(hidden(run))
        reported = found.step
    assert inside > 10, "the kills should have hit saves"
    assert reported > 10, "some saves should have been finished"


# The model folder


@pytest.mark.slow
def test_run_is_a_model_folder_before_during_and_after_a_swap(tmp_path: Path, tiny_folder: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run, ignore=shutil.ignore_patterns("unet"))
    weights = read_state(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")[0]

    def write(value: float) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            for part, sign in (("unet", -1), ("unet_ema", 1)):
                (folder / part).mkdir()
                shutil.copyfile(tiny_folder / "unet" / "config.json", folder / part / "config.json")
                changed = {name: torch.full_like(tensor, sign * value) for name, tensor in weights.items()}
                write_tensors(folder / part / "diffusion_pytorch_model.safetensors", changed)

        return fill

    def painted_with() -> float:
        model = load_model(spec_of_folder(run), device="cpu", dtype="float32", parts=("unet",))
        assert set(model.weights()) == {"unet"}
        values = {float(value) for tensor in model.unet.state_dict().values() for value in tensor.unique()}
        assert len(values) == 1
        return values.pop()

    seen: list[float] = []

    def look(index: int, call: Call) -> None:
        if call.path.parent == run:
            seen.append(painted_with())

    save_checkpoint(run, 1, write(1.0), facts={}, keep=1)
    link_model_folder(run, {"unet": "unet_ema", "raw/unet": "unet"})
    assert os.readlink(run / "unet") == "current/unet_ema"
    assert os.readlink(run / "raw" / "unet") == "../current/unet"
    assert painted_with() == 1.0
    with watched(run, before=look, after=look, **WATCH):
        save_checkpoint(run, 2, write(2.0), facts={}, keep=1)
        link_model_folder(run, {"unet": "unet_ema", "raw/unet": "unet"})
    assert painted_with() == 2.0
    assert set(seen) == {1.0, 2.0}
    assert seen == sorted(seen)
    assert len(seen) > 6
    moved = run.rename(tmp_path / "moved")  # relative links: the folder can move
    assert (moved / "unet" / "config.json").is_file()
    assert float(read_state(moved / "raw" / "unet" / "diffusion_pytorch_model.safetensors")[0].popitem()[1].max()) == -2


def test_no_link_is_made_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint yet"):
        link_model_folder(tmp_path, {"unet": "unet"})
    assert not os.listdir(tmp_path)


def test_what_stands_in_a_links_place_is_never_replaced(run: Path) -> None:
    (run / "unet").mkdir()
    (run / "unet" / "mine").write_text("precious")
    with pytest.raises(CannotWrite, match=r"cannot link .*unet to checkpoint-30"):
        link_model_folder(run, {"unet": "unet"})
    assert (run / "unet" / "mine").read_text() == "precious"
    assert not hidden(run)


def no_links(target: Any, path: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted", str(path))


def test_without_links_the_model_is_copied_at_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", no_links)
    parts = {"unet": "unet_ema", "raw/state.json": "train_state.json"}
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "old-shard.safetensors").write_text("from before")
        link_model_folder(tmp_path, parts)
        assert current_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
        assert not (tmp_path / "unet").is_symlink()
        assert sorted(os.listdir(tmp_path / "unet")) == ["config.json", "diffusion_pytorch_model.safetensors"]
        assert json.loads((tmp_path / "unet" / "config.json").read_text()) == {"value": step}
        assert json.loads((tmp_path / "raw" / "state.json").read_text()) == {"value": step}
    assert (tmp_path / "current").read_text() == "checkpoint-3\n"
    assert steps(tmp_path) == [2, 3]


@pytest.mark.slow
def test_without_links_no_fault_loses_a_checkpoint_or_leaves_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", no_links)

    def save_and_copy(run: Path, step: int) -> None:
        save(run, step, keep=2)
        link_model_folder(run, {"unet": "unet_ema"})

    template = tmp_path / "template"
    save_and_copy(template, 30)

    def play(run: Path, hook: Hook) -> None:
        with watched(run, before=hook, **WATCH):
            save_and_copy(run, 40)

    run = Path(shutil.copytree(template, tmp_path / "count"))
    with watched(run, **WATCH) as calls:
        save_and_copy(run, 40)
    for index in range(len(calls)):
        run = Path(shutil.copytree(template, tmp_path / f"died-{index}"))
        if index % 2:  # the others fail only: forking this process takes the most time
            assert in_a_child(partial(play, run, dying(index, half=True))) == DIED
        failed = Path(shutil.copytree(template, tmp_path / f"failed-{index}"))
        with contextlib.suppress(CannotWrite):
            play(failed, failing(index))
        for left in (run, failed):
            assert value_of(newest_checkpoint(left).path) in {30, 40}
            checkpoint_now = current_checkpoint(left)
            assert checkpoint_now is not None
            assert verify_checkpoint(checkpoint_now) is None
            read_state(left / "unet" / "diffusion_pytorch_model.safetensors")
            json.loads((left / "unet" / "config.json").read_text())


# The lock


HOLDER = """
    import os, sys, time
    from pathlib import Path
    from sdcli.training.state.run_lock import run_lock
    with run_lock(Path(sys.argv[1])):
        if os.fork() == 0:
            print(os.getpid(), flush=True)  # it says so itself: before it first runs it holds what its parent holds
            time.sleep(30)
            os._exit(0)
        time.sleep(30)
"""


def test_a_second_training_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            refusal = rf"in use by another training process \(process {holder.pid} on "
            with pytest.raises(CannotWrite, match=refusal), run_lock(tmp_path / "run"):
                pytest.fail("two hold the lock")
            holder.kill()
            holder.wait()
            os.kill(worker, 0)  # a data loading worker that lives on for a while does not hold it
            with run_lock(tmp_path / "run"):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
            holder.kill()


def test_the_lock_is_free_again_after_the_block_and_not_within_it(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path), pytest.raises(CannotWrite, match="in use"), run_lock(tmp_path):
            pass
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        assert in_a_child(lambda: None) == 0
        with pytest.raises(CannotWrite), run_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path), run_lock(tmp_path):
        pass


# The exchange of two names


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two names")
    assert (tmp_path / "a" / "which").read_text() == "b"
    assert (tmp_path / "b" / "which").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")
