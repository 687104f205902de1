"""Measure `sdcli generate --cluster local`: two workers of one thread compared with one process of one thread.

    python scripts/bench_cluster.py                       200 images of the starter
    python scripts/bench_cluster.py --images 96 --json docs/bench/cluster-cpu.json

Three runs of the same prompts: one process; the cluster; and as many plain processes at the same time as the cluster
has workers, each with its share, which is what the machine itself allows. A rate counts the images after the first
batch of each worker, so that it has nothing of the start-up; that is told apart: the engine, the workers, the end. The
images of the first two must have the same bytes; the exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_startup import machine

ROOT = Path(__file__).resolve().parent.parent
SDCLI = [sys.executable, "-m", "sdcli"]
STARTED = re.compile(
    r"the cluster took ([\d.]+) s to start, after which .* ready in ([\d.]+) s, its last in ([\d.]+) s"
)


@dataclass
class Timed:
    """One command: when each image came, in seconds from its start, and when it ended."""

    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stderr: str = ""


def generate(prompts: Path, outdir: Path, model: str, *options: str) -> Timed:
    """Run `sdcli generate` on a prompts file. Raises CalledProcessError."""
    command = [*SDCLI, "generate", "--prompts-file", str(prompts), "-m", model, "--seed", "1", "--device", "cpu"]
    command += ["--outdir", str(outdir), "--no-server", "--threads", "1", "-v", *options]
    timed, began = Timed(), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment, cwd=outdir.parent) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        stderr = process.stderr
        reader = threading.Thread(target=lambda: setattr(timed, "stderr", stderr.read()))
        reader.start()
        for line in process.stdout:
            if line.strip():
                timed.arrivals.append(time.monotonic() - began)
        process.wait()
        reader.join()
    timed.seconds = time.monotonic() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=timed.stderr)
    return timed


def rate(arrivals: list[float], first: int) -> float:
    """Images per second after the first so many."""
    times = sorted(arrivals)
    return (len(times) - first) / (times[-1] - times[first - 1])


def digests(*folders: Path) -> dict[str, str]:
    """The bytes of all images, by the prompt in their names; the index counts within a file of prompts."""
    return {
        path.name.partition("-")[2]: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.glob("*.png")
    }


def measure(model: str, images: int, workers: int, batch: int, folder: Path) -> dict[str, Any]:
    lines = [f"a fox number {number}" for number in range(images)]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(lines))
    size = ["--batch-size", str(batch)]
    report("one process")
    one = generate(prompts, folder / "one", model, *size)
    report(f"{workers} workers")
    cluster = generate(prompts, folder / "cluster", model, *size, "--cluster", "local", "--workers", str(workers))
    report(f"{workers} processes at the same time")
    shares: list[Timed] = []
    threads = []
    for number in range(workers):
        share = folder / f"share-{number}.txt"
        share.write_text("\n".join(lines[number * images // workers : (number + 1) * images // workers]))
        run = lambda share=share, number=number: shares.append(  # noqa: E731
            generate(share, folder / f"share-{number}", model, *size)
        )
        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = STARTED.search(cluster.stderr)
    assert found is not None, cluster.stderr
    engine, first_worker, last_worker = map(float, found.groups())
    rates = {
        "one process": rate(one.arrivals, batch),
        "cluster": rate(cluster.arrivals, batch * workers),
        "processes at the same time": sum(rate(share.arrivals, batch) for share in shares),
    }
    folders = [folder / f"share-{number}" for number in range(workers)]
    equal = digests(folder / "one") == digests(folder / "cluster")
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "model": model,
        "images": images,
        "images per batch": batch,
        "workers": workers,
        "images per second": {name: round(value, 3) for name, value in rates.items()},
        "efficiency": round(rates["cluster"] / workers / rates["one process"], 3),
        "efficiency of processes at the same time": round(
            rates["processes at the same time"] / workers / rates["one process"], 3
        ),
        "relative to processes at the same time": round(rates["cluster"] / rates["processes at the same time"], 3),
        "seconds": {
            "one process: whole": round(one.seconds, 2),
            "one process: first image": round(one.arrivals[0], 2),
            "cluster: whole": round(cluster.seconds, 2),
            "cluster: engine started": engine,
            "cluster: first worker ready, after the engine": first_worker,
            "cluster: last worker ready, after the engine": last_worker,
            "cluster: first image": round(cluster.arrivals[0], 2),
            "cluster: end, after the last image": round(cluster.seconds - cluster.arrivals[-1], 2),
        },
        "equal bytes": equal and len(digests(folder / "one")) == images,
        "images of processes at the same time": len(digests(*folders)),
    }


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.model, options.images, options.workers, options.batch_size, Path(folder))
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(not figures["equal bytes"])


if __name__ == "__main__":
    main()
