"""Simulate the driver of `sdcli generate --cluster` with many workers and many jobs: its time and memory per job.

    python scripts/simulate_cluster.py                                     10 million images, 1000 workers
    python scripts/simulate_cluster.py --images 1000000 --jobs 50000 --json docs/bench/cluster-simulation.json

The workers only answer, at once, and some die; what is measured is the driver alone: the scheduler, the loop of a run,
and the journal with its fsync, for all the images; and what comes before, for as many real jobs as --jobs says:
expanding a prompts file, planning batches, choosing names, pickling the units. No torch, no Ray: what Ray's messages
cost is not in here. Each part is measured at a tenth of its size, too, so that it shows whether they stay flat.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sdcli.cluster.generate_driver import _units  # noqa: E402
from sdcli.cluster.run import run_units  # noqa: E402
from sdcli.cluster.scheduler import UnitScheduler  # noqa: E402
from sdcli.cluster.units import (  # noqa: E402
    Attempt,
    FromWorker,
    ItemDone,
    ItemRow,
    Program,
    Throughput,
    Unit,
    UnitEnded,
    UnitFailed,
    WorkerDied,
    WorkerReady,
)
from sdcli.generation.journal import Journal, entry_of  # noqa: E402
from sdcli.generation.plan import Limits, plan  # noqa: E402
from sdcli.generation.resolve.jobs import ResolvedJob, expand  # noqa: E402
from sdcli.generation.settings import OutputSettings  # noqa: E402
from sdcli.generation.writer import Writer  # noqa: E402
from sdcli.models.registry import load_registry  # noqa: E402
from sdcli.request.jobs import Line  # noqa: E402

DEATHS = 0.0005
"""The share of attempts in which a worker dies."""


class Answering:
    """An engine whose workers answer at once with the rows of their units; some die half way."""

    def __init__(self, workers: int) -> None:
        self.seconds, self.workers = 0.0, workers
        self._messages: deque[tuple[int, FromWorker]] = deque()
        self._chance = random.Random(0)
        self.deaths = 0

    def start(self, number: int, program: Program) -> None:
        self._messages.append((number, WorkerReady("node", number, 0.0)))

    def submit(self, number: int, attempt: Attempt) -> None:
        rows = [ItemRow(item, {"status": "done", "entry": item}) for item in attempt.items if item not in attempt.done]
        if self._chance.random() < DEATHS:
            self.deaths += 1
            self._messages.extend((number, row) for row in rows[: len(rows) // 2])
            self._messages.append((number, WorkerDied("it was killed")))
        else:
            self._messages.extend((number, row) for row in rows)
            self._messages.append((number, UnitEnded()))

    def cancel(self, number: int) -> None: ...

    def kill(self, number: int) -> None: ...

    def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]:
        for _ in range(min(self.workers, len(self._messages))):
            yield self._messages.popleft()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(images: int, batch: int, workers: int) -> dict[str, float]:
    """The loop of a run and the journal, with units that are made as they are needed."""
    units = (Unit(n, tuple(range(n * batch, (n + 1) * batch)), None, "model") for n in range(images // batch))
    engine, before = Answering(workers), resident_mib()
    done = failed = 0
    largest = before
    with tempfile.TemporaryDirectory() as folder:
        journal, entries = Journal(Path(folder)), list[dict[str, Any]]()
        began, cpu = time.monotonic(), time.process_time()
        for event in run_units(engine, UnitScheduler(units), Program("", None, ""), stop=lambda: None):
            match event:
                case ItemDone():
                    done += 1
                    entries.append(entry_of("0" * 64, "0" * 64, f"{event.item:08}-1-a-fox.png", b""))
                case UnitFailed():
                    failed += len(event.items)
                case Throughput():
                    journal.add(entries)
                    entries.clear()
                    largest = max(largest, resident_mib())
        journal.add(entries)
        seconds, size = time.monotonic() - began, (Path(folder) / ".sdcli-journal.jsonl").stat().st_size
    assert done + failed == images // batch * batch
    return {
        "images": images,
        "microseconds per image": round((time.process_time() - cpu) / images * 1e6, 1),
        "images per second": round(images / seconds),
        "memory of the run, MiB": round(largest - before, 1),
        "deaths": engine.deaths,
        "images that failed": failed,
        "bytes of the journal per image": round(size / images),
    }


def prepare(count: int) -> dict[str, float]:
    """What comes before a run, with real jobs: lines -> jobs -> batches -> names -> pickled units."""
    registry, before = load_registry(), resident_mib()
    clock = [time.process_time()]

    def lap() -> float:
        clock.append(time.process_time())
        return round((clock[-1] - clock[-2]) / count * 1e6, 1)

    lines = (Line(n + 1, {"prompt": f"a fox number {n}"}) for n in range(count))
    jobs = list(expand(lines, {"model": "starter"}, registry, num_images=1, base_seed=1))
    good = [job for job in jobs if isinstance(job, ResolvedJob)]
    figures = {"jobs": count, "expanding, microseconds per job": lap()}
    batches = plan(good, Limits())
    figures["planning, microseconds per job"] = lap()
    figures["memory, KiB per job"] = round((resident_mib() - before) * 1024 / count, 2)
    with tempfile.TemporaryDirectory() as folder:
        size = sum(len(pickle.dumps(unit)) for unit in _units(batches, Writer(OutputSettings(outdir=Path(folder)))))
    figures["names and pickling, microseconds per job"] = lap()
    figures["bytes sent per job"] = round(size / count)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures: dict[str, Any] = {"workers": options.workers, "images per batch": options.batch_size}
    sizes = (options.images // 10, options.images)
    figures["run"] = [run(images, options.batch_size, options.workers) for images in sizes]
    figures["before"] = [prepare(count) for count in (options.jobs // 10, options.jobs)]
    assert "torch" not in sys.modules
    assert "ray" not in sys.modules
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
