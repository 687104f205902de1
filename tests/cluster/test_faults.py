"""Faults of workers, nodes and disks under real commands: the files are those of one process, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.data.cache.store import TensorStore
from tests.cluster.driver import address_space, driver, limit
from tests.cluster.processes import command_of
from tests.cluster.ray_nodes import cluster_of_one_node
from tests.conftest import Disk, Run

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ONE = ("--threads", "1", "-q")
"""One process that computes as a worker does."""
GENERATE = ("generate", "-m", "tiny", "--seed", "3", "--batch-size", "2", "--steps", "10", "--prompts-file")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of one node with room for two workers, which the tests of this file share."""
    with cluster_of_one_node(2) as cluster:
        yield cluster


def raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def on(nodes: Any, workers: int = 2) -> tuple[str, ...]:
    return ("--cluster", nodes.address, "--workers", str(workers), "--device", "cpu")


def draw(folder: Path, count: int) -> None:
    folder.mkdir()
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 192), Image.Resampling.BICUBIC).save(folder / f"{seed:03}.png")
        (folder / f"{seed:03}.txt").write_text(f"fox {seed % 5}")


def prompts(folder: Path, count: int = 24) -> None:
    (folder / "prompts.txt").write_text("\n".join(f"a fox number {number}" for number in range(count)))


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, which has no parts left."""
    hidden = {path.name for path in folder.glob(".*")}
    assert hidden <= {".sdcli-journal.jsonl"}
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in hidden)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def records(folder: Path) -> dict[tuple[str, bytes], dict[str, bytes]]:
    """The bytes of all records of a cache; which of its files has them is left to chance."""
    assert not (folder / "claims").exists()
    found = {}
    for kind in ("latents", "texts"):
        store = TensorStore(folder, kind)
        assert not store.damaged
        for key in map(bytes, store._index.keys):
            found[kind, key] = {name: part.numpy().tobytes() for name, part in store.get(key).items()}
    return found


@pytest.mark.parametrize("command", ["generate", "encode", "decode", "cache"])
def test_one_worker_that_cannot_write_and_one_that_is_killed_cost_no_file(
    command: str, nodes: Any, sdcli: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    """Names that collide are numbered as in one process, too."""
    prompts(tmp_path)
    draw(tmp_path / "images", 48)
    if command == "decode":
        encode = sdcli("encode", "images", "-m", "tiny", *ONE, "--outdir", "latents")
        assert encode.returncode == 0, encode.stderr
    cache = ("dataset", "cache", "images", "-m", tiny_folder, "--resolution", "64")
    work, folder = {
        "generate": ((*GENERATE, "prompts.txt", "-o", "fox"), "--outdir"),
        "encode": (("encode", "images", "-m", "tiny", "--batch-size", "1"), "--outdir"),
        "decode": (("decode", "latents", "-m", "tiny"), "--outdir"),
        "cache": ((*cache, "--batch-size", "1"), "--cache-dir"),
    }[command]
    alone = sdcli(*work, *ONE, folder, "one")
    assert alone.returncode == 0, alone.stderr
    with driver(tmp_path, *work, *on(nodes), folder, "many", roots=[raylet_of(nodes.head_node)]) as running:
        full, other = running.some_workers(2)
        limit(full, resource.RLIMIT_FSIZE, 64)
        while ".run" not in command_of(other):
            running.check()
        os.kill(other, signal.SIGKILL)
        code, _, err = running.end()
    assert code == 0, err
    assert "its process is gone, as after kill -9" in err
    assert "cannot write many" in err  # "File too large", or of a write that was cut "No space left on device"
    of = records if command == "cache" else files
    assert of(tmp_path / "many") == of(tmp_path / "one")
    assert len(of(tmp_path / "one")) >= 16


def test_the_death_of_a_node_costs_no_image(nodes: Any, sdcli: Run, tmp_path: Path) -> None:
    prompts(tmp_path)
    assert sdcli(*GENERATE, "prompts.txt", *ONE, "--outdir", "one").returncode == 0
    second = nodes.add_node(num_cpus=1, num_gpus=0)
    raylet = raylet_of(second)
    try:
        roots = [raylet_of(nodes.head_node), raylet]
        with driver(tmp_path, *GENERATE, "prompts.txt", *on(nodes, 3), "--outdir", "many", roots=roots) as running:
            here = running.worker_below(raylet)
            while ".run" not in command_of(here):
                running.check()
            os.kill(raylet, signal.SIGKILL)
            second.all_processes["raylet"][0].process.wait()  # its workers look whether there is such a process
            code, _, err = running.end()
    finally:
        nodes.remove_node(second, allow_graceful=False)
    assert code == 0, err
    assert "died: its node is gone" in err or "died: its process is gone" in err  # whichever Ray notices first
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_batch_that_needs_more_memory_than_any_worker_has_fails_alone(nodes: Any, sdcli: Run, tmp_path: Path) -> None:
    """It is tried on three processes, each with a real limit, which the other images stay below."""
    lines = [json.dumps({"prompt": f"a fox number {number}"}) for number in range(8)]
    large = json.dumps({"prompt": "an enormous fox", "width": 6144, "height": 6144})
    (tmp_path / "small.jsonl").write_text("\n".join(lines))
    (tmp_path / "mixed.jsonl").write_text("\n".join([*lines[:3], large, *lines[3:]]))
    assert sdcli(*GENERATE, "small.jsonl", *ONE, "--outdir", "one").returncode == 0
    limited: set[int] = set()
    roots = [raylet_of(nodes.head_node)]
    with driver(tmp_path, *GENERATE, "mixed.jsonl", *on(nodes), "--outdir", "many", roots=roots) as running:
        while running.process.poll() is None:
            for pid in set(running.workers()) - limited:
                if ".run" in command_of(pid):
                    with contextlib.suppress(OSError):
                        limit(pid, resource.RLIMIT_AS, address_space(pid) + 200 * 2**20)
                        limited.add(pid)
            time.sleep(0.02)
        code, _, err = running.end()
    assert code == 7, err
    assert "image 4: out of memory while denoising a single image; try a smaller --size (tried 3 times)" in err
    assert sorted(files(tmp_path / "many").values()) == sorted(files(tmp_path / "one").values())


def test_a_disk_that_is_full_for_all_ends_the_run_as_in_one_process_and_resume_goes_on(
    nodes: Any, disk: Disk, sdcli: Run, tmp_path: Path
) -> None:
    prompts(tmp_path)
    assert sdcli(*GENERATE, "prompts.txt", *ONE, "--outdir", "one").returncode == 0
    expected = files(tmp_path / "one")
    size = -(-sum(map(len, expected.values())) // 4096) * 4096
    disk.resize(size)
    work = (*GENERATE, "prompts.txt", "--outdir", disk.path)
    with driver(tmp_path, *work, *on(nodes), roots=[raylet_of(nodes.head_node)]) as running:
        code, _, err = running.end()
    assert code == 8, err
    assert "No space left on device" in err
    disk.resize(2**30)
    again = sdcli(*work, *ONE, "--resume")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in disk.path.glob("*.png")} == expected
