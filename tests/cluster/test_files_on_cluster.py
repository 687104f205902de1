"""`encode`, `decode` and `dataset cache` on a real local cluster: the files of one process, whatever dies."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.data.cache.store import TensorStore
from tests.cluster.processes import command_of, descendants
from tests.conftest import REPOSITORY, Run

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
LOCAL = ("--cluster", "local", "--workers", "2", "-q")
ONE = ("--threads", "1", "-q")
"""One process that computes as a worker does."""


def draw(folder: Path, count: int, *, size: tuple[int, int] = (40, 32)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{seed:03}.png")
        (folder / f"{seed:03}.txt").write_text(f"fox {seed % 5}")
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".sdcli-journal")
    )
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(folder: Path) -> dict[str, dict[bytes, dict[str, bytes]]]:
    """The bytes of all records of a cache, by kind and key."""
    found = {}
    for kind in ("latents", "texts"):
        store = TensorStore(folder, kind)
        assert not store.damaged
        keys = [bytes(key) for key in store._index.keys]
        found[kind] = {key: {name: part.numpy().tobytes() for name, part in store.get(key).items()} for key in keys}
    return found


def start(folder: Path, arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sdcli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, **pipes)  # type: ignore[call-overload,no-any-return]


def kill_a_worker(driver: subprocess.Popen[str], *, after: Iterator[bool]) -> None:
    """kill -9 of one of the driver's worker processes, once the condition holds."""
    until = time.monotonic() + 120
    while not next(after):
        assert time.monotonic() < until
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    workers = [pid for pid in descendants(driver.pid) if "ClusterWorker" in command_of(pid)]
    assert workers
    os.kill(workers[0], signal.SIGKILL)


def more_than(folder: Path, pattern: str, count: int) -> Iterator[bool]:
    while True:
        yield len(list(folder.glob(pattern))) > count


def test_latents_and_images_of_a_cluster_are_those_of_one_process(sdcli: Run, tmp_path: Path) -> None:
    draw(tmp_path / "images", 24)
    (tmp_path / "images" / "003.png").write_bytes(b"no image")
    encode = ("encode", "images", "-m", "tiny", "--batch-size", "2")
    assert sdcli(*encode, *ONE, "--outdir", "one", env={}).returncode == 7
    done = sdcli(*encode, *LOCAL, "--outdir", "many", "--json", env={})
    assert done.returncode == 7, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["status"] for row in rows].count("done") == 23
    assert [row["source"] for row in rows if row["status"] == "failed"] == ["images/003.png"]
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    again = sdcli(*encode, *LOCAL, "--outdir", "many", "--json", env={})
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()].count("skipped") == 23

    decode = ("decode", "one", "-m", "tiny")
    assert sdcli(*decode, *ONE, "--outdir", "images-one", env={}).returncode == 0
    driver = start(tmp_path, (*decode, *LOCAL, "--outdir", "images-many"))
    kill_a_worker(driver, after=more_than(tmp_path / "images-many", "*.png", 2))
    out, err = driver.communicate(timeout=170)
    assert driver.returncode == 0, err
    assert sorted(out.splitlines()) == sorted(f"images-many/{name}" for name in digests(tmp_path / "images-many"))
    assert digests(tmp_path / "images-many") == digests(tmp_path / "images-one")
    assert [path.name for path in (tmp_path / "images-many").glob(".sdcli-*")] == [".sdcli-journal.jsonl"]


def test_a_killed_driver_is_resumed_to_the_same_images(sdcli: Run, tmp_path: Path) -> None:
    draw(tmp_path / "images", 40)
    assert sdcli("encode", "images", "-m", "tiny", *ONE, "--outdir", "latents", env={}).returncode == 0
    decode = ("decode", "latents", "--resume")
    assert sdcli(*decode, *ONE, "--outdir", "one", env={}).returncode == 0
    driver = start(tmp_path, (*decode, *LOCAL, "--outdir", "many"))
    waiting = more_than(tmp_path / "many", "*.png", 3)
    until = time.monotonic() + 120
    while not next(waiting):
        assert time.monotonic() < until
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    done = sdcli(*decode, *LOCAL, "--outdir", "many", "--json", env={})
    assert done.returncode == 0, done.stderr
    statuses = [json.loads(line)["status"] for line in done.stdout.splitlines()]
    assert len(statuses) == 40
    assert statuses.count("skipped") >= 3
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


def test_a_cache_is_filled_by_workers_of_which_one_is_killed(sdcli: Run, tmp_path: Path, tiny_folder: Path) -> None:
    draw(tmp_path / "data", 60)
    (tmp_path / "data" / "007.png").write_bytes(b"no image")
    cache = ("dataset", "cache", "data", "-m", tiny_folder, "--resolution", "32", "--random-flip", "--json")
    one = sdcli(*cache, *ONE, "--cache-dir", "one", env={})
    assert one.returncode == 7, one.stderr
    driver = start(tmp_path, (*cache, *LOCAL, "--cache-dir", "many"))
    kill_a_worker(driver, after=more_than(tmp_path / "many" / "latents", "*.safetensors", 3))
    out, err = driver.communicate(timeout=170)
    assert driver.returncode == 7, err
    (row,), (expected,) = ([json.loads(line) for line in text.splitlines()] for text in (out, one.stdout))
    assert (row["pictures"], row["dropped"]) == (expected["pictures"], expected["dropped"]) == (59, 1)
    for kind in ("latents", "texts"):
        assert row[kind]["encoded"] + row[kind]["reused"] == expected[kind]["encoded"]
    assert records(tmp_path / "many") == records(tmp_path / "one")
    assert not (tmp_path / "many" / "claims").exists()


def test_what_a_cluster_cannot_do_is_refused(sdcli: Run, tmp_path: Path) -> None:
    draw(tmp_path / "images", 1)
    for arguments in (
        ("encode", "images", "--cluster", "local", "--shard", "1/2"),
        ("encode", "images/000.png", "--cluster", "local", "-o", "a.safetensors"),
        ("decode", "images/000.png", "--cluster", "local", "-o", "a.png"),
        ("dataset", "cache", "images", "--cluster", "local", "--shard", "1/2"),
        ("encode", "images", "--workers", "2"),
        ("encode", "images", "--cluster", "ftp://x"),
    ):
        assert sdcli(*arguments).returncode == 2, arguments
    assert digests(tmp_path).keys() == {"images/000.png", "images/000.txt"}
