"""Measure how long commands take as whole processes, compared with the shortest diffusers script.

Commands that compute nothing are compared with `python -c pass`, those that generate with a diffusers script for the
same image; RATIOS compares some with the import that they cannot do without. Every round runs each command once, so
that a slow moment of the machine affects all alike, and a ratio is the median of the rounds' ratios. The warm row is
the same command with a worker of --keep-warm, which the first round, that is not counted, starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sdcli.models.registry import load_registry

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / "sdcli" / "starter"
PROMPT = "an astronaut riding a horse"

# The same image with diffusers alone, at the starter's defaults.
DEFAULTS = load_registry().find("starter").defaults
DIFFUSERS = f"""
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(STARTER)!r}, dtype=torch.float32)
settings = dict(num_inference_steps={DEFAULTS.steps}, guidance_scale={DEFAULTS.guidance_scale})
image = pipe("{PROMPT}", generator=torch.Generator("cpu").manual_seed(0), **settings).images[0]
image.save("image.png")
"""

SDCLI = [sys.executable, "-m", "sdcli"]
EMPTY = "python -c pass"
THROUGH_SCRIPT = "scripts/sdcli --version"
BY_HAND = "diffusers script (starter)"
TYPER, TORCH = "python -c 'import typer'", "python -c 'import torch'"
COMMANDS: dict[str, list[str]] = {
    EMPTY: [sys.executable, "-c", "pass"],
    TYPER: [sys.executable, "-c", "import typer"],
    TORCH: [sys.executable, "-c", "import torch"],
    "--version": [*SDCLI, "--version"],
    "--help": [*SDCLI, "--help"],
    "generate --help": [*SDCLI, "generate", "--help"],
    "models list": [*SDCLI, "models", "list"],
    "generate --dry-run": [*SDCLI, "generate", "--dry-run", PROMPT],
    THROUGH_SCRIPT: [str(ROOT / "scripts" / "sdcli"), "--version"],
    "generate (tiny)": [*SDCLI, "generate", PROMPT, "-m", "tiny", "--seed", "0", "--no-server"],
    "generate (starter)": [*SDCLI, "generate", PROMPT, "-m", "starter", "--seed", "0", "--no-server"],
    "generate (starter, warm)": [*SDCLI, "generate", PROMPT, "-m", "starter", "--seed", "0", "--keep-warm", "60s"],
    BY_HAND: [sys.executable, "-c", DIFFUSERS],
}
BUDGETS = {
    "--version": 0.4,
    "--help": 0.3,
    "generate --help": 0.3,
    "models list": 0.4,
    "generate --dry-run": 0.4,
    "generate (tiny)": 3.0,
    "generate (starter, warm)": 0.45,
}
"""Seconds that a command may take; generating with the starter may take 0.7 of the diffusers script's time."""
RATIOS = {"--help": (TYPER, 4.0), "generate --help": (TYPER, 4.0), "generate (starter)": (TORCH, 1.6)}
"""Command -> what it is compared with, and how many times as long as that it may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--rounds", type=int, default=7, help="runs of each command (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only commands whose names contain this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times and the machine's name to this file")
    chosen = parser.parse_args()
    commands = {name: command for name, command in COMMANDS.items() if chosen.only in name}
    if not (ROOT / ".venv" / ".sdcli-stamp-run").exists():
        commands.pop(THROUGH_SCRIPT, None)  # it would measure the installation
    if not commands or chosen.rounds < 1:
        parser.error("nothing to measure")
    with tempfile.TemporaryDirectory(prefix="sdcli-") as runtime:  # no worker of the user takes part
        os.environ["XDG_RUNTIME_DIR"] = runtime
        seconds = measure(commands, rounds=chosen.rounds)
    print_table(seconds)
    if chosen.json:
        report = {
            "machine": machine(),
            "python": platform.python_version(),
            "ratios": {f"{name} / {base}": round(ratio, 3) for name, (base, ratio, _) in ratios(seconds).items()},
            "seconds": seconds,
        }
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(commands: dict[str, list[str]], *, rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round; a first round, which only warms the disk cache, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiles what it installs, so sdcli's modules are compiled as well
    for round_number in range(rounds + 1):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                done = subprocess.run(
                    command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
                )
                elapsed = time.perf_counter() - start
            if done.returncode:
                sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr}")
            if round_number:
                seconds[name].append(round(elapsed, 4))
    return seconds


def print_table(seconds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{machine()}, Python {platform.python_version()}; seconds, median of {len(next(iter(seconds.values())))}\n")
    print(f"{'command':28}{'median':>8}{'least':>8}{'budget':>8}   comparison")
    for name, times in seconds.items():
        budget = BUDGETS.get(name)
        if name == "generate (starter)" and BY_HAND in median:
            budget = 0.7 * median[BY_HAND]
        row = f"{name:28}{median[name]:8.3f}{min(times):8.3f}{f'{budget:8.2f}' if budget else ' ' * 8}   "
        if name.startswith("generate (") and BY_HAND in median:
            row += f"{median[name] / median[BY_HAND]:.2f} of the diffusers script"
        elif name not in (EMPTY, TYPER, TORCH, BY_HAND) and EMPTY in median:
            row += f"{median[name] - median[EMPTY]:+.3f} s over {EMPTY}"
        print(row.rstrip() + ("  OVER BUDGET" if budget and median[name] > budget else ""))
    print()
    for name, (base, ratio, wanted) in ratios(seconds).items():
        print(f"{name}: {ratio:.2f} of {base} (wanted: at most {wanted})")


def ratios(seconds: dict[str, list[float]]) -> dict[str, tuple[str, float, float]]:
    """Command -> what it is compared with, the median of the rounds' ratios, and the wanted ratio."""
    return {
        name: (base, statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True)), wanted)
        for name, (base, wanted) in RATIOS.items()
        if name in seconds and base in seconds
    }


def highest_memory(pid: int) -> int:
    """The highest resident set of a process in bytes, on Linux; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def machine() -> str:
    """The number of usable cores and the processor's name, as far as the system reports it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{cores}-core {name}"


if __name__ == "__main__":
    main()
