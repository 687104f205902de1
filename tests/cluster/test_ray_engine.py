"""Light units on real Ray processes, which are killed, fail and run out of disk: each item is done exactly once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdcli.cluster.ray_engine import ClusterSettings, RayEngine
from sdcli.cluster.run import run_units
from sdcli.cluster.scheduler import UnitScheduler
from sdcli.cluster.units import ItemDone, Program, RunEvent, Throughput, Trouble, Unit, UnitFailed
from sdcli.errors import Interrupted, NotFound, SdcliError, UsageError
from tests.cluster.light import Harm
from tests.cluster.processes import gone
from tests.cluster.ray_nodes import cluster_of_one_node

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node with three CPUs, which the tests of this file share; workers are new in each."""
    with cluster_of_one_node(3) as cluster:
        yield cluster


def program(folder: Path, start: str = "tests.cluster.light:start", **fields: Any) -> Program:
    folder.mkdir(exist_ok=True)
    return Program(start, str(folder), fields.pop("here", str(folder)), **fields)


def units(count: int, harm: Mapping[int, Harm] | None = None, *, size: int = 2) -> list[Unit]:
    return [Unit(n, tuple(range(n * size, n * size + size)), (harm or {}).get(n)) for n in range(count)]


def run(
    cluster: Any,
    folder: Path,
    work: list[Unit],
    *,
    stop: Callable[[], Interrupted | None] = lambda: None,
    watch: Callable[[RunEvent], None] = lambda event: None,
    **settings: Any,
) -> list[RunEvent]:
    events: list[RunEvent] = []
    with RayEngine(ClusterSettings(cluster.address, **{"workers": 2, "device": "cpu", **settings})) as engine:
        for event in run_units(engine, UnitScheduler(work), program(folder), stop=stop):
            events.append(event)
            watch(event)
    return events


def rows(events: list[RunEvent]) -> dict[int, dict[str, Any]]:
    done = [event for event in events if isinstance(event, ItemDone)]
    assert len({event.item for event in done}) == len(done)
    return {event.item: event.values for event in done}


def troubles(events: list[RunEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Trouble)]


def files(folder: Path) -> set[int]:
    assert not list(folder.glob("*.tmp"))
    return {int(path.stem) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_each_kind_of_harm_costs_an_attempt_and_no_item(head: Any, tmp_path: Path) -> None:
    harm = {2: Harm("kill", 1, after=1), 5: Harm("exit", 1), 8: Harm("raise", 1, after=1), 11: Harm("full", 1)}
    events = run(head, tmp_path, units(20, harm))
    assert set(rows(events)) == files(tmp_path) == set(range(40))
    texts = troubles(events)
    assert len(texts) == 4
    assert sum("died: " in text for text in texts) == 2
    assert any("unexpected ValueError: an unexpected thing; batch 8 is tried again" in text for text in texts)
    assert any("No space left on device; batch 11 is tried again" in text for text in texts)
    assert {values["threads"] for values in rows(events).values()} == {"1"}
    last = [event for event in events if isinstance(event, Throughput)][-1]
    assert last.rows == 40
    assert sum(worker.items for worker in last.workers) == 40
    assert last.seconds["engine"] > 0


@pytest.mark.slow
def test_a_poisoned_unit_is_tried_on_three_workers_and_the_rest_goes_on(head: Any, tmp_path: Path) -> None:
    events = run(head, tmp_path, units(8, {0: Harm("kill", after=1)}))
    (failure,) = (event for event in events if isinstance(event, UnitFailed))
    assert failure.items == (1,)
    assert str(failure.error).startswith("worker ")
    assert str(failure.error).endswith("(tried 3 times)")
    assert set(rows(events)) == files(tmp_path) == set(range(16)) - {1}


def test_a_stop_ends_within_a_step_and_leaves_no_worker(head: Any, tmp_path: Path) -> None:
    stopping = threading.Event()
    began: list[float] = []

    def stop() -> Interrupted | None:
        return Interrupted("enough") if stopping.is_set() else None

    def watch(event: RunEvent) -> None:
        if isinstance(event, Throughput) and len([one for one in event.workers if one.doing.startswith("step")]) == 2:
            stopping.set()
            began.append(time.monotonic())

    with pytest.raises(Interrupted, match="enough"):
        run(head, tmp_path, units(4, {n: Harm("slow") for n in range(4)}), stop=stop, watch=watch)
    assert time.monotonic() - began[0] < 5
    pids = {int(path.name) for path in (tmp_path / "workers").iterdir() if path.name.isdigit()}
    assert len(pids) == 2
    assert not gone(pids)


@pytest.mark.slow
def test_a_worker_that_does_not_share_the_folder_is_not_used(head: Any, tmp_path: Path) -> None:
    with RayEngine(ClusterSettings(head.address, workers=1, device="cpu")) as engine:
        missing = program(tmp_path, here=str(tmp_path / "elsewhere"))
        with pytest.raises(NotFound, match=r"has no folder .*elsewhere .*all nodes must share it"):
            list(run_units(engine, UnitScheduler(units(1)), missing, stop=lambda: None))
        unseen = program(tmp_path, probe=str(tmp_path / "probe"))
        with pytest.raises(NotFound, match="does not see the files"):
            list(run_units(engine, UnitScheduler(units(1)), unseen, stop=lambda: None))
        broken = program(tmp_path, start="tests.cluster.nothing:start")
        with pytest.raises(SdcliError, match="unexpected ModuleNotFoundError"):
            list(run_units(engine, UnitScheduler(units(1)), broken, stop=lambda: None))


def test_what_the_cluster_has_no_room_for_is_refused_before_anything_waits_for_it(head: Any) -> None:
    for settings, reason in [
        ({"threads": 64}, "no node of the cluster has room for a worker: it needs 64 CPUs"),
        ({"device": "cuda"}, "the cluster has no GPU"),
        ({"device": "auto", "gpus": 0.5}, "the cluster has no GPU, so --gpus-per-worker has no effect"),
    ]:
        with (
            pytest.raises(UsageError, match=reason),
            RayEngine(ClusterSettings(head.address, **{"device": "cpu", **settings})),
        ):
            pass
    with RayEngine(ClusterSettings(head.address)) as engine:
        assert (engine.workers, engine.device) == (3, "cpu")
    with RayEngine(ClusterSettings(head.address, threads=2)) as engine:
        assert engine.workers == 1


def test_no_other_module_imports_ray_and_it_is_not_needed_to_be_told_what_is_missing(tmp_path: Path) -> None:
    importing = [path for path in (REPOSITORY / "sdcli").rglob("*.py") if "import ray\n" in path.read_text()]
    assert [path.name for path in importing] == ["ray_engine.py"]
    script = (
        "import importlib.metadata as metadata\nfrom sdcli.cluster.ray_engine import ClusterSettings, RayEngine\n"
        "from sdcli.errors import UsageError\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "for version in (missing, lambda name: '2.9.3'):\n"
        "    metadata.version = version\n"
        "    try: RayEngine(ClusterSettings())\n"
        "    except UsageError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    python = [sys.executable, "-c", script]
    done = subprocess.run(python, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "--cluster needs Ray: pip install 'sdcli[cluster]'",
        "Ray 2.9.3 is too old for --cluster: pip install 'sdcli[cluster]' brings a newer one",
    ]
