#!/usr/bin/env python3
"""Compare a guided UNet step and a VAE decode of sdcli with those of other programs, in turns in one run, on the CPU.

The programs compute with the same random weights of Stable Diffusion 1.5 from the same inputs, in float32 where they
can, and what each of them computes is compared with sdcli's. Every program runs in a process of its own: it loads,
computes once unmeasured, then `--repeats` times; the programs take turns for `--rounds`. The figures are medians; the
ratios are those of one round. The seconds depend on the machine and the hour; the ratios of one run count.

stable-diffusion.cpp makes whole images only. The time of a step is that between two of its reports of progress, that of
a decode is the one in its log, once in each process; what is compared is an image after `--repeats` and one more steps.

The other programs are no dependencies of sdcli. They go into an environment of their own, beside sdcli, and their
models into a folder (7 GB for each size, and 4 GB for stable-diffusion.cpp, prepared for one number of `--repeats`):

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -e . openvino onnx onnxscript onnxruntime
    CMAKE_ARGS="-DGGML_NATIVE=ON" /tmp/peers/bin/pip install stable-diffusion-cpp-python   # half an hour of one core
    /tmp/peers/bin/python scripts/bench_peers.py --prepare --size 256 --work /tmp/peers/models
    /tmp/peers/bin/python scripts/bench_peers.py --size 256 --work /tmp/peers/models --json docs/bench/peers-cpu.json

`--programs` chooses some, `--parts step` or `decode` one of the two. A run that was ended goes on where it was when it
is called again: it keeps what each finished process measured, until all have. With `--seconds` it ends by itself,
before a process that might not be done by then. A process during which other work took more than a tenth of a core does
not count; the next call runs it again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peer_programs import converted, networks, sd_cpp  # noqa: E402 - sdcli's folder has to be found first
from peer_programs.common import MODEL, PARTS, Figures, output_file  # noqa: E402

PROGRAMS = {
    "sdcli": "sdcli, float32",
    "diffusers": "diffusers with its defaults, float32",
    "openvino": "OpenVINO, float32",
    "openvino-bf16": "OpenVINO, bfloat16 asked for",
    "onnxruntime": "ONNX Runtime, float32",
    "sd.cpp-f32": "stable-diffusion.cpp, f32",
    "sd.cpp-f16": "stable-diffusion.cpp, f16",
    "sd.cpp-q8_0": "stable-diffusion.cpp, q8_0",
}
FLOOR = "floor"
MOST_OTHERS = 0.1
"""The share of one core that other processes may take meanwhile; beyond it, the next call runs the process again."""
PREPARE = {
    "openvino": converted.prepare_openvino,
    "onnxruntime": converted.prepare_onnxruntime,
    "sd.cpp": sd_cpp.prepare_sd_cpp,
}
WORKERS = {
    "sdcli": networks.run_sdcli,
    "diffusers": networks.run_diffusers,
    "openvino": converted.run_openvino,
    "onnxruntime": converted.run_onnxruntime,
    "sd.cpp": sd_cpp.run_sd_cpp,
    FLOOR: networks.run_floor,
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(WORKERS[kind_of(arguments.worker)](arguments)))
    elif arguments.prepare:
        arguments.work.mkdir(parents=True, exist_ok=True)
        for kind in dict.fromkeys(map(kind_of, arguments.programs)):
            if kind in PREPARE:
                PREPARE[kind](arguments)
    else:
        compare(arguments)


def kind_of(program: str) -> str:
    """A program without the numbers that it computes with."""
    return program.partition("-")[0]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="convert the model for the programs, no more")
    parser.add_argument("--work", type=Path, required=True, help="folder for the programs' models and output")
    parser.add_argument("--size", type=int, default=512, help="image width and height in pixels (%(default)s)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=1, help="processes of each program (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls in each process (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each program (%(default)s)")
    parser.add_argument("--sd-cpp-flash", action="store_true", help="stable-diffusion.cpp with its flash attention")
    parser.add_argument("--sd-cpp-direct", action="store_true", help="and with its direct convolutions")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="name in the output")
    parser.add_argument("--seconds", type=float, help="start no process that may end later than that; call again then")
    parser.add_argument("--restart", action="store_true", help="forget what an ended run measured")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--worker", choices=[*PROGRAMS, FLOOR], help=argparse.SUPPRESS)
    return parser.parse_args()


# The comparison


def compare(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    held = arguments.work / f"runs-{arguments.size}.json"
    runs = [] if arguments.restart else runs_held(held, settings)
    for number, name in turns_left(runs, arguments, time.perf_counter()):
        print(f"round {number + 1}: {name} ...", file=sys.stderr, flush=True)
        begun, busy = time.perf_counter(), cpu_of_others()
        figures = run_worker(name)
        took, others = time.perf_counter() - begun, cpu_of_others() - busy
        runs.append({"round": number, "program": name, "took_s": took, "others_s": others, **figures})
        if not alone(runs[-1]):
            print(f"other processes took {others:.1f} s of CPU meanwhile: not counted", file=sys.stderr)
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        held.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2) + "\n")
    if missing := len(turns(arguments)) - sum(run["program"] != FLOOR for run in counted(runs)):
        print(f"{missing} processes are left: call this again", file=sys.stderr)
        return
    result = summary(settings, counted(runs), arguments)
    show(result)
    if arguments.json:
        written = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*written, result], indent=2) + "\n")
    held.unlink()


def settings_of(arguments: argparse.Namespace) -> Figures:
    """What the figures of one comparison have in common."""
    names = ("machine", "size", "programs", "parts", "threads", "rounds", "repeats", "sd_cpp_flash", "sd_cpp_direct")
    return {"model": MODEL, **{name: getattr(arguments, name) for name in names}}


def runs_held(file: Path, settings: Figures) -> list[Figures]:
    """What the processes of a comparison that was ended measured. Raises SystemExit if it was another one."""
    if not file.exists():
        return []
    held = json.loads(file.read_text())
    if other := [
        f"{name} {held['settings'].get(name)}" for name in settings if held["settings"].get(name) != settings[name]
    ]:
        raise SystemExit(f"{file} holds a comparison with {', '.join(other)}: repeat that call, or use --restart")
    runs: list[Figures] = held["runs"]
    return runs


def turns(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    return [(number, name) for number in range(arguments.rounds) for name in arguments.programs]


def turns_left(runs: Sequence[Figures], arguments: argparse.Namespace, begun: float) -> Iterator[tuple[int, str]]:
    """The floor once in each call, then the turns that no process has had, while there is time for them.

    A process is expected to take as long as that program did before, or else as the longest of all.
    """
    done = {(run["round"], run["program"]) for run in counted(runs)}
    left = [turn for turn in turns(arguments) if turn not in done]
    if left:
        yield sum(run["program"] == FLOOR for run in runs), FLOOR
    for number, name in left:
        took = {run["program"]: run["took_s"] for run in runs}
        expected = took.get(name, max(took.values()))
        if arguments.seconds and time.perf_counter() - begun + expected > arguments.seconds:
            return
        yield number, name


def counted(runs: Sequence[Figures]) -> list[Figures]:
    """By rounds, without processes that other work overlapped; of the floor all, since its operations count anyway."""
    return sorted((run for run in runs if run["program"] == FLOOR or alone(run)), key=lambda run: run["round"])


def alone(run: Figures) -> bool:
    return bool(run["others_s"] <= MOST_OTHERS * run["took_s"])


def cpu_of_others() -> float:
    """Seconds of CPU that all processes but this one and those it started took, and the host kept; 0 but on Linux."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - ours


def run_worker(name: str) -> Figures:
    """What a process measured, or {"failed": the last line that it said}."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode} and said nothing"]
        return {"failed": lines[-1]}
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def summary(settings: Figures, runs: Sequence[Figures], arguments: argparse.Namespace) -> Figures:
    floors = [run for run in runs if run["program"] == FLOOR]
    by_program = {name: [run for run in runs if run["program"] == name] for name in arguments.programs}
    rates = [run["gflops"] for run in floors if alone(run)]
    return {
        **{name: value for name, value in settings.items() if name != "programs"},
        "floor": {
            "gflops": max(rates, default=None),
            **{f"{part}_tflop": floors[0][f"{part}_tflop"] for part in PARTS},
        },
        "programs": {name: program_summary(name, by_program, arguments) for name in arguments.programs},
    }


def program_summary(name: str, by_program: dict[str, list[Figures]], arguments: argparse.Namespace) -> Figures:
    """Medians and extremes over all calls of a program, its ratio to sdcli, and how far from sdcli's its output is."""
    runs = by_program[name]
    if failed := [run["failed"] for run in runs if "failed" in run]:
        return {"failed": failed[0]}
    figures: Figures = {key: runs[0][key] for key in runs[0] if key.startswith("note")}
    figures["version"] = runs[0]["version"]
    figures["load_s"] = statistics.median(run["load_s"] for run in runs)
    figures["peak_gb"] = round(max(run["peak_gb"] for run in runs), 2)
    ours = [] if name == "sdcli" else by_program.get("sdcli", [])
    for part in arguments.parts:
        seconds = [second for run in runs for second in run[part]]
        figures[part] = {"s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
        if ours and part in ours[0]:
            figures[part]["ratio"] = statistics.median(
                statistics.median(theirs[part]) / statistics.median(own[part])
                for theirs, own in zip(runs, ours, strict=True)
            )
            figures[part] |= difference_to_sdcli(name, part, arguments) or {}
    return figures


def difference_to_sdcli(name: str, part: str, arguments: argparse.Namespace) -> Figures | None:
    """Of a UNet's output or of decoded pixels, or of a whole image; None where sdcli did not run."""
    import numpy

    find = sd_cpp.image_file if kind_of(name) == "sd.cpp" else lambda *given: output_file(*given, part)
    ours, theirs = find(arguments, "sdcli"), find(arguments, name)
    if not (ours.exists() and theirs.exists()):
        return None
    a, b = numpy.load(ours).astype("float64"), numpy.load(theirs).astype("float64")
    if a.shape != b.shape:
        raise SystemExit(f"{name}: {part} has the shape {b.shape}, sdcli's has {a.shape}")
    distance = numpy.abs(a - b)
    return {
        "largest_difference": float(distance.max()),
        "mean_difference": float(distance.mean()),
        "mean_magnitude": float(numpy.abs(a).mean()),
    }


def show(result: Figures) -> None:
    floor = result["floor"]
    print(f"{MODEL}, {result['size']}x{result['size']}, {result['threads']} threads; {result['machine']}")
    rate = floor["gflops"]
    print(f"products of float32 matrices: {f'{rate:.0f} GFLOP/s' if rate else 'other work overlapped them'}")
    for part in result["parts"]:
        tflop = floor[f"{part}_tflop"]
        least = tflop * 1e3 / rate if rate else None
        print(f"{part}: {tflop:.3f} TFLOP" + (f", so {least:.2f} s at that rate" if least else ""))
        for name, figures in result["programs"].items():
            print(f"  {PROGRAMS[name]:40}" + (row(figures[part], least) if part in figures else figures["failed"]))


def row(figures: Figures, least: float | None) -> str:
    """One line of the table: seconds, ratio to sdcli, share of the floor (`least` seconds), difference."""
    spread = f"({figures['least_s']:.2f} to {figures['most_s']:.2f})"
    ratio = f"{figures['ratio']:6.2f} of sdcli's" if "ratio" in figures else " " * 17
    far = ""
    if "mean_difference" in figures:
        far = f"  differs by {figures['mean_difference']:.1e} (at most {figures['largest_difference']:.1e})"
    share = f"{least / figures['s']:7.0%} of the floor" if least else ""
    return f"{figures['s']:8.2f} s {spread:18}{ratio}{share}{far}"


if __name__ == "__main__":
    main()
