#!/usr/bin/env python
"""Compare how well the starter's UNet learns in bfloat16 and in float32: validation losses, paired by seed.

Each run trains the UNet from scratch on scikit-learn's digits (pip install scikit-learn), captioned by their names,
with `sdcli train-unet --mixed-precision no` or `bf16`. Afterwards its weights are validated in float32, so that both
are compared alike. On a CPU without bfloat16 kernels, matrix products and convolutions compute in float32 and round
their results to bfloat16, as the kernels do: the losses are those of bfloat16, but the seconds are not.

    python scripts/bench_bf16_training.py --json docs/bench/bf16-training-cpu.json            # all runs
    python scripts/bench_bf16_training.py --json docs/bench/bf16-training-cpu.json --runs 1   # the next one only

Runs that the file holds already are not repeated, unless they had other settings.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PRECISIONS = ("no", "bf16")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TOLERANCE = 0.01
"""Relative difference of validation losses that counts as none; it is far below what a person sees."""
STUDENT = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}
"""Runs per precision -> Student's t for a one-sided bound of 95 %."""


def main() -> None:
    options = parse_arguments()
    if options.worker:
        print(json.dumps(run_worker(options, json.loads(options.worker))))
        return
    settings = {name: getattr(options, name) for name in ("steps", "batch", "size", "samples", "learning_rate")}
    runs = kept_runs(options.json, settings)
    done = {(run["seed"], run["precision"]) for run in runs}
    seeds = range(options.seeds) if options.seed is None else [options.seed]
    names = PRECISIONS if options.precision is None else (options.precision,)
    missing = [(seed, name) for seed in seeds for name in names if (seed, name) not in done]
    for seed, precision in missing[: options.runs]:
        print(f"seed {seed}, --mixed-precision {precision} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps([seed, precision])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        if options.json:
            runs = add_run(options.json, settings, runs[-1])
    show(report(settings, runs))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels (%(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="images of the data set to use (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs (%(default)s)")
    parser.add_argument("--seed", type=int, help="make the runs of this seed only")
    parser.add_argument("--precision", choices=PRECISIONS, help="make the runs with this precision only")
    parser.add_argument("--runs", type=int, help="make at most so many of the missing runs (default: all)")
    parser.add_argument("--json", type=Path, help="file of the figures, written after every run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seeds < 2 or options.steps < 10:
        parser.error("a comparison needs at least two seeds, and 10 steps")
    return options


# One run


def run_worker(options: argparse.Namespace, chosen: Sequence[Any]) -> dict[str, Any]:
    """Train in this process, and validate the result in float32."""
    seed, precision = chosen
    with tempfile.TemporaryDirectory() as folder, float32_kernels() as emulated:
        work = Path(folder)
        make_digits(work / "digits", options.size)
        base = {
            "resolution": str(options.size),
            "seed": seed,
            "train_batch_size": options.batch,
            "max_train_samples": options.samples,
            "validation_split": 0.12,
            "cache_dir": work / "cache",
            "device": "cpu",
            "sample_every_n_steps": 10**9,
            "sample_prompts": (NAMES[0],),
            "sample_steps": 1,
        }
        started = time.perf_counter()
        log = train(
            work,
            {
                **base,
                "from_scratch": "starter",
                "learning_rate": options.learning_rate,
                "lr_scheduler": "cosine",
                "lr_warmup_steps": options.steps // 15,
                "max_train_steps": options.steps,
                "mixed_precision": precision,
                "validation_steps": max(1, options.steps // 6),
                "checkpointing_steps": 10**9,
            },
        )
        seconds = time.perf_counter() - started
        steps, losses = log.series("validation", "loss")
        _, trained = log.series("train", "loss")
        return {
            "seed": seed,
            "precision": precision,
            "validation_float32": validate(work, {**base, "model": str(work / "run"), "mixed_precision": "no"}),
            "validation": dict(zip(map(str, steps), losses, strict=True)),
            "train_last_tenth": statistics.fmean(trained[-max(1, options.steps // 10) :]),
            "seconds": round(seconds, 1),
            "emulated": emulated and precision == "bf16",
        }


def train(work: Path, values: Mapping[str, Any]) -> Any:
    """Run `sdcli train-unet` on the digits; returns the log of the run."""
    from sdcli.training.run_log import read_log

    with session(work, work / "run", values) as training:
        for _ in training.prepare(resume=False):
            pass
        for _ in training.train(stop=lambda: None):
            pass
    return read_log(work / "run")


def validate(work: Path, values: Mapping[str, Any]) -> float:
    """The validation loss of the trained weights, computed in float32 on the images that training held out."""
    import torch

    from sdcli.training.evaluation import evaluating

    with session(work, work / "validated", values) as validating:
        for _ in validating.prepare(resume=False):
            pass
        task = validating.setup.task
        with evaluating(task.networks.values()), torch.no_grad():
            return float(task.validate(task.networks)["loss"])


def session(work: Path, run: Path, values: Mapping[str, Any]) -> Any:
    """A session of `sdcli train-unet`, with an accelerator of its own."""
    from accelerate.state import AcceleratorState

    from sdcli.models.registry import load_registry
    from sdcli.training.config_files import settings_from
    from sdcli.training.unet.session import UnetSession
    from sdcli.training.unet.settings import UnetSettings

    AcceleratorState._reset_state(reset_partial_state=True)
    return UnetSession(str(work / "digits"), run, settings_from(UnetSettings, values), load_registry())


def make_digits(out: Path, size: int) -> None:
    """The digits in folders named after them, which are their captions."""
    from make_digits_dataset import METHODS
    from make_digits_dataset import write as write_digits
    from sklearn.datasets import load_digits

    digits = load_digits()
    write_digits(digits.images, digits.target, out, size=size, method=METHODS["bicubic"])
    for number, name in enumerate(NAMES):
        (out / str(number)).rename(out / name)


@contextlib.contextmanager
def float32_kernels() -> Iterator[bool]:
    """Compute bfloat16 products and convolutions in float32 where this CPU has no kernels for them; yields whether."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    from sdcli.io.devices import cpu_has_bfloat16_kernels

    aten = torch.ops.aten
    products = {
        aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default,
        aten.bmm.default, aten.baddbmm.default,
    }  # fmt: skip

    class Float32Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            half = func in products and any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args)
            if not half:
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, (args, kwargs)
            )
            result = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, lambda t: t.bfloat16() if t.dtype == torch.float32 else t, result)

    if cpu_has_bfloat16_kernels():
        yield False
        return
    with Float32Kernels():
        yield True


# The comparison


def report(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import torch
    from bench_startup import machine

    ordered = sorted(runs, key=lambda run: (run["seed"], PRECISIONS.index(run["precision"])))
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "settings": dict(settings),
        "verdict": verdict(ordered),
        "runs": ordered,
    }


def verdict(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether bfloat16 learns as well: the mean relative difference of the pairs, and a one-sided bound of 95 %.

    `spread` is the standard deviation of float32's own losses over the seeds, relative to their mean.
    """
    losses = {(run["seed"], run["precision"]): run["validation_float32"] for run in runs}
    seeds = sorted({seed for seed, _ in losses if all((seed, name) in losses for name in PRECISIONS)})
    if len(seeds) < 2:
        return {"pairs": len(seeds), "learns_as_well": None}
    differences = [losses[seed, "bf16"] / losses[seed, "no"] - 1 for seed in seeds]
    plain = [losses[seed, "no"] for seed in seeds]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(seeds))
    bound = mean + STUDENT.get(len(seeds), 2.0) * error
    return {
        "pairs": len(seeds),
        "float32": statistics.fmean(plain),
        "bfloat16": statistics.fmean(losses[seed, "bf16"] for seed in seeds),
        "relative_differences": differences,
        "mean_difference": mean,
        "bound_95": bound,
        "spread": statistics.stdev(plain) / statistics.fmean(plain),
        "tolerance": TOLERANCE,
        "learns_as_well": bool(bound <= TOLERANCE),
    }


def show(result: Mapping[str, Any]) -> None:
    print(f"{result['machine']}, torch {result['torch']}, {result['settings']}")
    for run in result["runs"]:
        curve = "  ".join(f"{step}: {loss:.4f}" for step, loss in run["validation"].items())
        emulated = ", in float32 kernels" if run["emulated"] else ""
        print(
            f"seed {run['seed']} {run['precision']:4}  {run['validation_float32']:.4f} at the end in float32; "
            f"{run['seconds']:.0f} s{emulated}; {curve}"
        )
    found = result["verdict"]
    if found["learns_as_well"] is None:
        print("no verdict yet: it needs two pairs")
        return
    learns = "as well" if found["learns_as_well"] else "worse, or more seeds are needed"
    print(
        f"validation loss {found['float32']:.4f} in float32, {found['bfloat16']:.4f} in bfloat16: "
        f"{found['mean_difference']:+.2%}, at most {found['bound_95']:+.2%} (95 %); seeds alone differ by "
        f"{found['spread']:.2%}. bfloat16 learns {learns} (tolerance {found['tolerance']:.0%})."
    )


def kept_runs(file: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs with these settings that the file holds."""
    kept = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    runs: list[dict[str, Any]] = kept.get("runs", []) if kept.get("settings") == settings else []
    return runs


def add_run(file: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add a run to the file, to which another call of this script may be adding one as well; returns all of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        runs = [*kept_runs(file, settings), dict(run)]
        temporary = file.with_name(f".{file.name}.new")
        temporary.write_text(json.dumps(report(settings, runs), indent=2) + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        os.close(folder)
    return runs


if __name__ == "__main__":
    main()
