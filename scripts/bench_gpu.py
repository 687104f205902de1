#!/usr/bin/env python
"""Measure sdcli on a GPU beside diffusers, in parts, within a time budget; made for an NVIDIA H200 and 8 minutes.

    python scripts/bench_gpu.py                                             # all parts, docs/bench/gpu.json and gpu.md
    python scripts/bench_gpu.py --parts sd15-batch1 vae --budget 120
    python scripts/bench_gpu.py --miniature --device cpu --json /tmp/gpu.json   # tiny networks: does each part work?

Each part (scripts/gpu_parts) runs in a process of its own, the most valuable first. Its contenders take turns
in one process on the same weights, after a warm-up each; figures are medians. The file is written after every part: a
part that fails is recorded with its error, a part that would not fit into the budget as skipped, and the others go on.
Rows named "by this script" are what sdcli does not offer itself: they show what it would gain.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "scripts" / "gpu_parts" / "run.py"

PARTS = {
    "parity": ("Parity with diffusers in half precision, all schedulers", 60),
    "sd15-batch1": ("Stable Diffusion 1.5, 512x512, batch 1, 50 guided steps", 100),
    "sd15-batch16": ("Stable Diffusion 1.5, 512x512, batch 16, 50 guided steps", 85),
    "sdxl": ("Stable Diffusion XL, 1024x1024, batch 1, 30 guided steps", 70),
    "vae": ("VAE of Stable Diffusion 1.5", 30),
    "train": ("train-unet, Stable Diffusion 1.5, 512x512, batch 16, cached latents, bf16, fused AdamW", 70),
    "train-compile": ("The same with --compile", 90),
    "fsdp": ("FSDP2 (fully_shard) on one process, by this script", 45),
    "starter": ("The starter's recipe for GPUs", 40),
}
"""Part -> its title, and the seconds that it is expected to take on an H200; not measured yet."""
LAST = "starter"
"""This part takes the time that is left, if there is more than it needs."""
RESERVE = 10
"""Seconds at the end that no part may use."""


def main() -> int:
    options = parse_arguments()
    began = time.monotonic()
    result: dict[str, Any] = {**facts(options), "budget_s": options.budget, "parts": {}}
    for name in options.parts:
        left = options.budget - RESERVE - (time.monotonic() - began)
        title, expected = PARTS[name]
        expected = 1 if options.miniature else expected
        if left < expected:
            entry: dict[str, Any] = {"skipped": f"{left:.0f} s are left, and it takes about {expected} s"}
        else:
            print(f"{name}: {title} ...", file=sys.stderr, flush=True)
            entry = run_part(name, options, seconds=left)
        result["parts"][name] = {"title": title, **entry}
        result["seconds"] = round(time.monotonic() - began, 1)
        write(options.json, result)
    print(markdown(result))
    return 1 if any("error" in part for part in result["parts"].values()) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run, in this order")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="time for all parts (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--miniature", action="store_true", help="tiny networks and two steps, to try the script")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "docs" / "bench" / "gpu.json",
        help="file for the figures; the tables go beside it, as .md (docs/bench/gpu.json)",
    )
    parser.add_argument(
        "--starter-work",
        type=Path,
        metavar="WORK",
        help="go on with recipes/starter/gpu in this folder, which scripts/starter/parts.py unpacked "
        "(default: the settings of its first UNet, on images of noise)",
    )
    options = parser.parse_args()
    if options.device == "cpu" and not options.miniature:
        parser.error("--device cpu needs --miniature: at full size it would take hours")
    return options


def run_part(name: str, options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; its rows, those of a failed part as well, with its error."""
    started = time.monotonic()
    command = [sys.executable, str(WORKER), name, "--device", options.device, "--seconds", f"{seconds:.0f}"]
    command += ["--miniature"] if options.miniature else []
    command += ["--starter-work", str(options.starter_work)] if options.starter_work else []
    paths = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=max(1.0, seconds))
            error = "" if code == 0 else last_line(errors) or f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            error = f"not finished within the {seconds:.0f} s that were left"
        finally:  # with the processes that it started itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        messages = list(json_lines(output.read()))
    rows = {
        row["name"]: row for message in messages for row in message.get("rows", [])
    }  # later figures replace earlier
    entry: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "rows": list(rows.values())}
    return {**entry, "error": error} if error else entry


def last_line(errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; libraries print others."""
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the line of a process that was ended


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the way of the run. Exits where there is no such device."""
    import torch
    from bench_startup import machine

    from sdcli.training.run_log import versions

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --miniature --device cpu tries the script without one")
    gpu = None
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "gpu": gpu,
        "versions": versions(),
        "miniature": options.miniature,
    }


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write the figures, and the table beside them; an interrupted write leaves the previous files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(result, indent=2) + "\n"), (file.with_suffix(".md"), markdown(result))):
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def markdown(result: Mapping[str, Any]) -> str:
    """A short page: a table for each part, or the reason why there is none."""
    gpu = result["gpu"]["name"] if result["gpu"] else "no GPU"
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers"))
    warning = "**Miniature networks: the figures mean nothing.** " if result["miniature"] else ""
    lines = [
        "# Measurements on a GPU",
        "",
        f"{warning}`scripts/bench_gpu.py`, {result['date']}: {gpu}, {result['machine']}, {versions}. Times are "
        "medians; ratios compare with the first row.",
    ]
    for name, part in result["parts"].items():
        lines += ["", f"## {part['title']} (`{name}`)", ""]
        if "skipped" in part:
            lines.append(f"Not measured: {part['skipped']}.")
        if "error" in part:
            lines.append(f"Not measured to its end: {part['error'].rstrip('.')}.")
        lines += [""] if "error" in part and part["rows"] else []
        lines += table(part.get("rows", []))
    return "\n".join(lines) + "\n"


def table(rows: list[Mapping[str, Any]]) -> list[str]:
    """The rows of one part with all columns that any of them has, and a line for each row that was not measured."""
    measured = [row for row in rows if "skipped" not in row]
    columns = list({key: None for row in measured for key, value in row.items() if key != "name" and value is not None})
    lines = []
    if measured:
        head = ["", *(LABELS.get(column, column) for column in columns)]
        lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [f"| {' | '.join([row['name'], *(shown(c, row.get(c)) for c in columns)])} |" for row in measured]
    missing = [f"- {row['name']}: not measured: {row['skipped']}" for row in rows if "skipped" in row]
    return [*lines, *([""] if lines and missing else []), *missing]


LABELS = {
    "step_s": "a step",
    "image_s": "an image",
    "seconds": "time",
    "ratio": "ratio",
    "peak_bytes": "peak memory",
    "samples_per_s": "samples/s",
    "warm_up_s": "warm-up",
    "max_error": "largest difference",
    "error": "sdcli beside diffusers",
    "rounding": "diffusers beside its float32",
    "own_rounding": "sdcli beside the same float32",
}


def shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "peak_bytes":
        return f"{value / 1e9:.2f} GB"
    if column in {"step_s", "image_s", "seconds", "warm_up_s"}:
        return f"{value:.4f} s" if value < 1 else f"{value:.2f} s"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
