"""Several processes fill one cache: each unit is encoded by one of them, and what a killed one had by another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.data.cache import claims as claims_module
from sdcli.data.cache.claims import Claims
from sdcli.data.cache.division import chunks_by_size, places_of_shard, unit_length
from sdcli.data.cache.store import TensorStore
from sdcli.errors import CannotWrite
from sdcli.generation.run_shard import RunShard
from tests.conftest import REPOSITORY, Run
from tests.data.cache.filling import begin, filling_processes

# Claims


def files(folder: Path) -> list[Path]:
    return sorted((folder / "claims").glob("*")) if (folder / "claims").exists() else []


def test_the_claim_of_a_process_that_is_gone_goes_with_the_next_one_even_if_its_work_was_done(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from sdcli.data.cache.claims import Claims; "
    code += "assert Claims(Path(sys.argv[1])).take('done'); os._exit(0)"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    with Claims(tmp_path) as other:
        assert other.take("b")
        with Claims(tmp_path) as one:
            assert list(one.turns(["done"], name=str, is_done=lambda unit: True)) == []
        assert [path.stem for path in files(tmp_path)] == ["b"], "that of a process that is alive stays"


def test_a_unit_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a")
        assert not other.take("a")
        assert not one.take("a")
        assert other.take("b")
        one.release(["a"])
        assert other.take("a")
        assert len(files(tmp_path)) == 2
    assert files(tmp_path) == []
    assert not (tmp_path / "claims").exists()


def test_of_many_threads_that_want_a_unit_one_gets_it(tmp_path: Path) -> None:
    for turn in range(20):
        every = [Claims(tmp_path) for _ in range(8)]
        start, won = threading.Barrier(8), list[bool]()

        def take(claims: Claims, name: str, start: threading.Barrier, won: list[bool]) -> None:
            start.wait()
            won.append(claims.take(name))

        threads = [threading.Thread(target=take, args=(claims, str(turn), start, won)) for claims in every]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from sdcli.data.cache.claims import Claims\n"
    program += "claims = Claims(Path(sys.argv[1])); print(claims.take('a'), flush=True); sys.stdin.readline()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with Claims(tmp_path) as claims:
        assert not claims.take("a")
        holder.kill()
        holder.communicate()
        assert claims.take("a")


def test_the_claim_of_another_machine_is_taken_over_when_it_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(claims_module, "machine", lambda: "0" * 8)
        patch.setattr(claims_module.os, "getpid", lambda: 2**22 - 3)  # no process of ours
        gone, alive = Claims(tmp_path, beat=60), Claims(tmp_path, beat=0.05)
        assert gone.take("gone")
        assert alive.take("alive")
    with Claims(tmp_path, stale=0.5) as claims, alive:
        assert not claims.take("gone")
        until = time.monotonic() + 20
        while not claims.take("gone"):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert not claims.take("alive")
    gone.release()  # which no longer is its own
    assert files(tmp_path) == []


def test_a_claim_that_was_never_written_whole_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    torn = tmp_path / "claims" / "a.json"
    torn.write_text('{"token": "12')
    with Claims(tmp_path) as claims:
        assert not claims.take("a")
        os.utime(torn, (time.time() - 1000,) * 2)
        assert claims.take("a")


def test_a_claim_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("in the way")
    with Claims(tmp_path) as claims, pytest.raises(CannotWrite):
        claims.take("a")


def test_units_of_others_are_looked_at_again_until_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "LOOK_SECONDS", 0.01)
    done: set[int] = set()
    order: list[int | None] = []
    with Claims(tmp_path) as other, Claims(tmp_path) as claims:
        assert other.take("1")
        assert other.take("2")
        for unit in claims.turns(range(4), name=str, is_done=done.__contains__):
            order.append(unit)
            if unit is not None:
                done.add(unit)
            elif order.count(None) == 1:
                done.add(1)  # the other one has done it
            else:
                other.release(["2"])  # and leaves this
    assert order == [0, 3, None, None, 2]


# How the work is divided


def test_units_are_whole_batches_of_one_size_and_hold_every_image_once() -> None:
    rng = np.random.default_rng(0)
    sizes = [((32, 32), (32, 40), (40, 32))[kind] for kind in rng.integers(0, 3, 1000)]
    for batch in (1, 3, 8):
        length = unit_length(len(sizes), batch)
        units = chunks_by_size(sizes, length)
        assert sorted(np.concatenate(units).tolist()) == list(range(1000))
        assert all(len({sizes[place] for place in unit}) == 1 for unit in units)
        assert length % batch == 0
        assert sum(len(unit) != length for unit in units) <= 3
        parts = [places_of_shard(sizes, RunShard(index, 7), batch=batch) for index in range(1, 8)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
        whole = {tuple(chunk) for chunk in chunks_by_size(sizes, batch)}
        of_parts = {
            tuple(part[chunk]) for part in parts for chunk in chunks_by_size([sizes[place] for place in part], batch)
        }
        assert of_parts == whole
    assert [unit_length(count, 8) for count in (0, 1, 300, 10**6)] == [8, 8, 8, 256]
    assert places_of_shard([], RunShard(1, 2), batch=1).tolist() == []


# Processes

COUNT = 24


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    for seed in range(COUNT):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(tmp_path / "data" / f"{seed:02}.png")
    with filling_processes(tiny_folder, tmp_path) as processes:

        def run(cache: str = "cache", *, pause: float = 0.05) -> subprocess.Popen[str]:
            return processes(cache, pause=pause, claims=True)

        yield run


def counts(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Encoded and reused, of a process that came to its end."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    encoded, reused, items = map(int, out.split()[-3:])
    assert items == COUNT
    return encoded, reused


def records(folder: Path) -> dict[bytes, dict[str, bytes]]:
    """Key -> the bytes of the tensors, of all records of a cache."""
    store = TensorStore(folder, "latents")
    assert not store.damaged
    keys = [bytes(key) for key in store._index.keys]
    assert len(set(keys)) == len(keys), "a record is there twice"
    return {key: {name: tensor.numpy().tobytes() for name, tensor in store.get(key).items()} for key in keys}


@pytest.mark.slow
def test_two_runs_that_fill_one_cache_at_once_encode_each_image_once(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    processes = [start(pause=0.03), start(pause=0.04)]
    begin(*processes)
    encoded = [counts(process) for process in processes]
    assert [one + other for one, other in encoded] == [COUNT] * 2
    assert sum(one for one, _ in encoded) == COUNT
    assert all(one > 2 for one, _ in encoded), "both had work"
    assert len(records(tmp_path / "cache")) == COUNT
    assert not (tmp_path / "cache" / "claims").exists()


@pytest.mark.slow
def test_what_killed_workers_had_is_encoded_by_the_others_to_the_same_bytes(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    alone = start("alone", pause=0)
    begin(alone)
    counts(alone)
    for turn in range(3):
        cache = f"cache-{turn}"
        processes = [start(cache, pause=0.1) for _ in range(3)]
        begin(*processes)
        for process in processes[:2]:
            assert process.stdout is not None
            assert process.stdout.readline() == "began\n"
            time.sleep(0.1 * turn)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert files(tmp_path / cache), "the claims of killed workers are still there"
        began = time.monotonic()
        encoded, reused = counts(processes[2])
        assert time.monotonic() - began < 30, "it did not wait until the claims were a minute old"
        assert encoded + reused == COUNT
        assert records(tmp_path / cache) == records(tmp_path / "alone")
        assert files(tmp_path / cache) == []


@pytest.mark.slow
def test_all_workers_killed_and_started_again_and_again_come_to_the_end(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    alone = start("alone", pause=0)
    begin(alone)
    counts(alone)
    for turn in range(4):
        processes = [start(pause=0.03) for _ in range(2)]
        begin(*processes)
        time.sleep(0.05 + 0.1 * turn)
        for process in processes:
            process.kill()
            process.wait()
    last = start(pause=0)
    begin(last)
    counts(last)
    assert records(tmp_path / "cache") == records(tmp_path / "alone")


# The command


@pytest.mark.slow
def test_shards_of_the_command_fill_what_one_run_fills(sdcli: Run, tmp_path: Path, tiny_folder: Path) -> None:
    for seed in range(9):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((32 + 8 * (seed % 2), 32)).save(tmp_path / "data" / f"{seed}.png")
        (tmp_path / "data" / f"{seed}.txt").write_text(f"fox {seed % 4}\nanimal")
    (tmp_path / "data" / "broken.png").write_text("hello")
    arguments = ("dataset", "cache", "data", "-m", tiny_folder, "--resolution", "32", "--random-flip", "-q", "--json")
    whole = sdcli(*arguments, "--cache-dir", "whole")
    assert whole.returncode == 7, whole.stderr
    expected = row_of(whole.stdout)
    rows = []
    for index in (1, 2, 3):
        done = sdcli(*arguments, "--cache-dir", "parts", "--shard", f"{index}/3")
        assert done.returncode == (7 if index == 1 else 0), done.stderr
        rows.append(row_of(done.stdout))
    for kind in ("latents", "texts"):
        assert sum(row[kind]["encoded"] for row in rows) == expected[kind]["encoded"]
    assert sum(row["pictures"] for row in rows) == expected["pictures"] == 9
    assert sum(row["dropped"] for row in rows) == 1
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    empty = sdcli(*arguments, "--cache-dir", "parts", "--shard", "50/50")
    assert empty.returncode == 0
    assert row_of(empty.stdout)["pictures"] == 0


def row_of(printed: str) -> dict[str, Any]:
    (row,) = [json.loads(line) for line in printed.splitlines()]
    found: dict[str, Any] = row
    return found
