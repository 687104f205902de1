"""Simulates the driver of a cluster of a thousand workers with up to ten million images, without torch and without Ray.

    python scripts/bench_cluster_scale.py                     # 10 thousand, 100 thousand and 1 million images
    python scripts/bench_cluster_scale.py --images 10000000   # some minutes on one core
    python scripts/bench_cluster_scale.py --write             # docs/bench/cluster-scale.json, which keeps other sizes

The list of jobs, the planner, the names, the scheduler, the driver's loop and the journal are those of `sdcli generate
--cluster`; the workers are simulated: they answer at once, and some of them die. Each size is measured in a process of
its own, which reports its time per image and its largest memory. What a driver does once for each line of the prompts
file, the resolution of its request, takes longer than all of that; it is a stage of its own (--only resolving).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdcli.cluster.generate_driver import ClusterEvent, generate_on
from sdcli.cluster.units import Attempt, FromWorker, ItemRow, Program, UnitEnded, WorkerDied, WorkerReady
from sdcli.generation.events import Result
from sdcli.generation.journal import Journal, entry_of
from sdcli.generation.plan import BatchPlaces, Limits
from sdcli.generation.resolve.job_spool import JobSpool
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.writer import Writer
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line, Occurrences, read_lines

SIZES = (10_000, 100_000, 1_000_000)
WORKERS = 1000
BATCH = 8
DEATHS = 20_000
"""One of so many units kills its worker at the first attempt."""
PROMPT = "a red fox in the snow, highly detailed"
RESULT = Path(__file__).resolve().parent.parent / "docs" / "bench" / "cluster-scale.json"


# The jobs


@functools.cache
def kinds() -> tuple[ResolvedJob, ...]:
    """Jobs of 24 kinds, which cannot share batches: two models, four sizes, three numbers of steps."""
    lines = [
        Line(0, {"prompt": PROMPT, "model": model, "width": width, "height": height, "steps": steps, "seed": 1})
        for model in ("starter", "tiny")
        for width in (64, 128)
        for height in (64, 128)
        for steps in (4, 8, 20)
    ]
    jobs = list(expand(lines, {}, load_registry(), num_images=1, base_seed=0))
    found = [job for job in jobs if isinstance(job, ResolvedJob)]
    assert len(found) == 24
    return tuple(found)


def jobs_of(count: int) -> Iterator[ResolvedJob]:
    """Jobs whose requests were resolved before: what is left is what the driver does with each."""
    every, rng = kinds(), random.Random(1)
    for index in range(1, count + 1):
        kind = every[rng.randrange(24)]
        yield ResolvedJob(index, kind.request.model_copy(update={"seed": index}), kind.model)


def spooled(count: int) -> Sequence[ResolvedJob]:
    """The jobs where the driver has them: on the disk."""
    return JobSpool(jobs_of(count)).resolved()


# The cluster


class SimulatedEngine:
    """A thousand workers that answer in a random order; now and then one dies with its unit."""

    seconds = 0.0

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._messages: list[tuple[int, FromWorker]] = []
        self._busy: dict[int, Attempt] = {}
        self._rng = random.Random(2)
        self.deaths = self.attempts = 0

    def start(self, number: int, program: Program) -> None:
        self._messages.append((number, WorkerReady("node", number, 0.0)))

    def submit(self, number: int, attempt: Attempt) -> None:
        self._busy[number] = attempt
        self.attempts += 1

    def cancel(self, number: int) -> None:
        self._busy.pop(number, None)

    def kill(self, number: int) -> None:
        self._busy.pop(number, None)

    def poll(self, seconds: float) -> Iterator[tuple[int, FromWorker]]:
        messages, self._messages = self._messages, []
        yield from messages
        for number in self._rng.sample(sorted(self._busy), k=-(-len(self._busy) // 4)):
            attempt = self._busy.pop(number)
            if attempt.number == 1 and not self._rng.randrange(DEATHS):
                self.deaths += 1
                yield number, WorkerDied("simulated")
                continue
            for item in attempt.items:
                if item not in attempt.done:
                    key = f"{item:064x}"
                    entry = entry_of(key, key, attempt.payload.names[item], b"image")
                    values = {"status": "done", "path": entry["path"], "seconds": 0.0, "fallbacks": []}
                    yield number, ItemRow(item, {**values, "entry": entry})
            yield number, UnitEnded()


# The measurements


def memory() -> int:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return work(), time.process_time() - began


def planning(count: int) -> dict[str, Any]:
    """Jobs into the file, and which of them make a batch."""
    jobs, writing = timed(lambda: spooled(count))
    batches, seconds = timed(lambda: sum(1 for _ in BatchPlaces(jobs, Limits(BATCH))))
    return {"batches": batches, "cpu_seconds": writing + seconds, "writing_cpu_seconds": writing}


def running(count: int) -> dict[str, Any]:
    """A whole run on simulated workers, its journal on the disk, synced once a second as the driver does."""
    with tempfile.TemporaryDirectory() as folder:
        engine, journal = SimulatedEngine(WORKERS), Journal(Path(folder))
        writer = Writer(OutputSettings(outdir=Path(folder)), journal)
        jobs, writing = timed(lambda: spooled(count))
        done, seconds = timed(lambda: sum(_is_done(event) for event in _run(engine, jobs, writer, journal)))
        assert done == count, done
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        deaths = {"deaths": engine.deaths, "attempts": engine.attempts}
        return {"cpu_seconds": writing + seconds, "journal_bytes_per_image": size / count, **deaths}


def _run(
    engine: SimulatedEngine, jobs: Sequence[ResolvedJob], writer: Writer, journal: Journal
) -> Iterator[ClusterEvent]:
    begun = ("prompts.jsonl", 0)
    return generate_on(
        engine, jobs, RunSettings(), writer, journal, Limits(BATCH), finished={}, begun=begun, stop=lambda: None
    )


def _is_done(event: ClusterEvent) -> bool:
    return isinstance(event, Result) and event.status == "done"


def resuming(count: int) -> dict[str, Any]:
    """What --resume does with the journal: read it, and look up requests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        digest = hashlib.sha256(b"image").hexdigest()
        with open(path / ".sdcli-journal.jsonl", "w") as file:
            for number in range(count):
                key = hashlib.sha256(str(number).encode()).hexdigest()
                entry = {"request": key, "job": key, "path": f"{number:05}-1-a-red-fox.png", "sha256": digest}
                file.write(json.dumps(entry) + "\n")
        journal = Journal(path)
        (path / "one.png").write_bytes(b"image")
        _, seconds = timed(lambda: journal.base_seed("prompts.txt"))
        some = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(0, count, max(1, count // 5000))]
        found, looked = timed(lambda: sum(next(journal._entries(key), None) is not None for key in some))
        assert found == len(some)
        return {"cpu_seconds": seconds, "microseconds_per_lookup": 1e6 * looked / len(some)}


def occurrences(count: int) -> dict[str, Any]:
    """Counting equal requests, by which open seeds are derived."""
    seen = Occurrences()
    _, seconds = timed(lambda: [seen.add(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}") for number in range(count)][:0])
    return {"cpu_seconds": seconds}


def resolving(count: int) -> dict[str, Any]:
    """A prompts file -> resolved jobs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps({"prompt": f"a red fox number {n}", "steps": 20}) + "\n" for n in range(count))
        before, registry = memory(), load_registry()
        found = expand(read_lines(str(path)), {"model": "starter"}, registry, num_images=1, base_seed=0)
        jobs, seconds = timed(lambda: JobSpool(found).resolved())
        assert len(jobs) == count
        return {"cpu_seconds": seconds, "bytes_held_per_image": (memory() - before) / count}


STAGES: dict[str, Callable[[int], dict[str, Any]]] = {
    "planning": planning,
    "running": running,
    "resuming": resuming,
    "occurrences": occurrences,
    "resolving": resolving,
}


def measure(stage: str, count: int) -> dict[str, Any]:
    """One stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--images", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=list(SIZES), help="sizes of the runs")
    parser.add_argument("--only", choices=STAGES, nargs="+", help="these stages alone")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the result into docs/bench")
    options = parser.parse_args()
    if options.stage:
        (count,) = options.images
        kinds()  # whose imports are not part of any stage
        before = memory()
        found = STAGES[options.stage](count)
        assert "torch" not in sys.modules
        print(json.dumps({**found, "memory_bytes": memory(), "memory_before_bytes": before}))
        return
    result: dict[str, Any] = json.loads(RESULT.read_text()) if options.write and RESULT.exists() else {}
    result |= {"workers": WORKERS, "batch": BATCH, "python": platform.python_version(), "machine": machine()}
    stages = result.setdefault("stages", {})
    for stage in options.only or [name for name in STAGES if name != "resolving"]:
        for count in options.images:
            row = stages.setdefault(stage, {})[str(count)] = measure(stage, count)
            row["microseconds_per_image"] = round(1e6 * row["cpu_seconds"] / count, 2)
            row |= {name: round(value, 3) for name, value in row.items() if isinstance(value, float)}
            print(f"{stage:12} {count:>11,}  {shown(row)}", file=sys.stderr)
            if options.write:
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if not options.write:
        print(json.dumps(result, indent=1))


def shown(row: dict[str, Any]) -> str:
    microseconds, memory = row["microseconds_per_image"], row["memory_bytes"] / 2**20
    return f"{microseconds:8.2f} us/image {memory:8.0f} MiB (before: {row['memory_before_bytes'] / 2**20:.0f})"


def machine() -> str:
    """What ran it, without its name."""
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
