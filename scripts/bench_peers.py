#!/usr/bin/env python3
"""Compare a guided UNet step and a VAE decode of sdcli with those of other programs, in turns in one run, on the CPU.

The programs compute with the same random weights of Stable Diffusion 1.5 from the same inputs, in float32 where they
can, and what each of them computes is compared with sdcli's. Every program runs in a process of its own: it loads,
computes once unmeasured, then `--repeats` times; the figures are the medians over the rounds. The seconds depend on
the machine and the hour; the ratios of one run count.

The other programs are no dependencies of sdcli. They go into an environment of their own, beside sdcli, and their
models into a folder (8 GB for one size):

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -e . openvino onnx onnxscript onnxruntime
    /tmp/peers/bin/python scripts/bench_peers.py --prepare --size 256 --work /tmp/peers/models
    /tmp/peers/bin/python scripts/bench_peers.py --size 256 --work /tmp/peers/models --json docs/bench/peers-cpu.json

`--programs` chooses some, `--parts step` or `decode` one of the two; `--json` adds to what a file of the same machine
holds for other parts and sizes, so that a long comparison can be made in several short runs.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

MODEL = "random-sd15"
GUIDANCE, TIMESTEP, SEED = 7.5, 500.0, 0
STEP, DECODE = "step", "decode"
PROGRAMS = {
    "sdcli": "sdcli, float32",
    "diffusers": "diffusers with its defaults, float32",
    "openvino": "OpenVINO, float32",
    "openvino-bf16": "OpenVINO, bfloat16 asked for",
    "onnxruntime": "ONNX Runtime, float32",
}
Call = Callable[[], Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker.partition("-")[0]](arguments)))
    elif arguments.prepare:
        arguments.work.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(name.partition("-")[0] for name in arguments.programs):
            if name in PREPARE:
                PREPARE[name](arguments)
    else:
        compare(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="convert the model for the programs, no more")
    parser.add_argument("--work", type=Path, required=True, help="folder for the programs' models and output")
    parser.add_argument("--size", type=int, default=512, help="image width and height in pixels (%(default)s)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--parts", nargs="+", choices=(STEP, DECODE), default=[STEP, DECODE])
    parser.add_argument("--rounds", type=int, default=1, help="processes of each program (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls in each process (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each program (%(default)s)")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="name in the output")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--worker", choices=[*PROGRAMS, "floor"], help=argparse.SUPPRESS)
    return parser.parse_args()


# The comparison


def compare(arguments: argparse.Namespace) -> None:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ["floor", *arguments.programs]}
    for number in range(arguments.rounds):
        for name in runs:
            print(f"round {number + 1}: {name} ...", file=sys.stderr, flush=True)
            runs[name].append(run_worker(name))
            print(json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    floors = runs.pop("floor")
    result = {
        "machine": arguments.machine,
        "model": MODEL,
        "size": arguments.size,
        "parts": arguments.parts,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "repeats": arguments.repeats,
        "floor": {key: statistics.median(run[key] for run in floors) for key in floors[0]},
        "programs": {name: summary(name, runs[name], arguments) for name in runs},
    }
    show(result)
    if arguments.json:
        held = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*held, result], indent=2) + "\n")


def run_worker(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def summary(name: str, runs: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians and extremes over all calls of a program, and how far what it computed is from sdcli's."""
    figures: dict[str, Any] = {key: runs[0][key] for key in runs[0] if key.startswith("note")}
    figures["version"] = runs[0]["version"]
    figures["load_s"] = statistics.median(run["load_s"] for run in runs)
    figures["peak_gb"] = round(max(run["peak_gb"] for run in runs), 2)
    for part in arguments.parts:
        seconds = [second for run in runs for second in run[part]]
        figures[part] = {"s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
        if name != "sdcli" and (difference := difference_to_sdcli(name, part, arguments)) is not None:
            figures[part] |= difference
    return figures


def difference_to_sdcli(name: str, part: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """Of a UNet's output or of decoded pixels; None where sdcli did not run."""
    import numpy

    ours, theirs = output_file(arguments, "sdcli", part), output_file(arguments, name, part)
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


def output_file(arguments: argparse.Namespace, name: str, part: str) -> Path:
    return Path(arguments.work / f"{name}-{part}-{arguments.size}.npy")


def show(result: dict[str, Any]) -> None:
    floor = result["floor"]
    print(f"{MODEL}, {result['size']}x{result['size']}, {result['threads']} threads; {result['machine']}")
    print(f"products of float32 matrices: {floor['gflops']:.0f} GFLOP/s")
    base = result["programs"].get("sdcli")
    for part in result["parts"]:
        least = floor[f"{part}_tflop"] * 1e3 / floor["gflops"]
        print(f"{part}: {floor[f'{part}_tflop']:.3f} TFLOP, so {least:.2f} s at that rate")
        for name, figures in result["programs"].items():
            ours, far = figures[part], ""
            if "mean_difference" in ours:
                far = f"  differs by {ours['mean_difference']:.1e} (at most {ours['largest_difference']:.1e})"
            ratio = f"{ours['s'] / base[part]['s']:6.2f} of sdcli's" if base else ""
            spread = f"({ours['least_s']:.2f} to {ours['most_s']:.2f})"
            print(
                f"  {PROGRAMS[name]:40}{ours['s']:8.2f} s {spread:18}{ratio}{least / ours['s']:7.0%} of the floor{far}"
            )


# What every program computes


def inputs(size: int) -> dict[str, Any]:
    """Latents and text states of both guided halves, and latents to decode."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    cells = size // 8
    one = noise(1, 4, cells, cells)
    return {
        "x": torch.cat([one, one]),
        "t": torch.tensor([TIMESTEP]),
        "states": noise(2, 77, 768),
        "latents": noise(1, 4, cells, cells),
    }


def guide(output: Any) -> Any:
    """The two halves of a UNet's output, without and with the prompt, as one."""
    return output[:1] + GUIDANCE * (output[1:] - output[:1])


def timed(arguments: argparse.Namespace, calls: dict[str, Call], *, started: float, version: str) -> dict[str, Any]:
    """Run each call once unmeasured, keeping what it gives, then `--repeats` times."""
    import numpy

    figures: dict[str, Any] = {"load_s": time.perf_counter() - started, "version": version}
    for part in arguments.parts:
        numpy.save(output_file(arguments, arguments.worker, part), numpy.asarray(calls[part]()))
        figures[part] = []
        for _ in range(arguments.repeats):
            begun = time.perf_counter()
            calls[part]()
            figures[part].append(time.perf_counter() - begun)
    figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return figures


def networks_of(arguments: argparse.Namespace, load: Callable[..., Any]) -> Any:
    """The model in memory, with the networks that the measured parts need."""
    from sdcli.models.registry import load_registry

    left_out = {"text_encoder"} if DECODE in arguments.parts else {"text_encoder", "vae"}
    return load(load_registry().find(MODEL), device="cpu", dtype="float32", leave_out=left_out)


# The programs


def run_sdcli(arguments: argparse.Namespace) -> dict[str, Any]:
    from sdcli.io.threads import wait_without_spinning

    wait_without_spinning()
    started = time.perf_counter()
    import torch

    import sdcli
    from sdcli.diffusion.pipeline import load_denoiser

    torch.set_num_threads(arguments.threads)
    model = networks_of(arguments, load_denoiser)
    with torch.inference_mode():
        return timed(arguments, torch_calls(arguments, model), started=started, version=sdcli.__version__)


def run_diffusers(arguments: argparse.Namespace) -> dict[str, Any]:
    """diffusers' networks as they are after loading; the allocator and the threads' waiting as torch has them."""
    started = time.perf_counter()
    import diffusers
    import torch

    torch.set_num_threads(arguments.threads)
    model = plain_model(arguments)
    with torch.inference_mode():
        return timed(arguments, torch_calls(arguments, model), started=started, version=diffusers.__version__)


def plain_model(arguments: argparse.Namespace) -> Any:
    """diffusers' networks without anything that sdcli does to make them quick."""
    from sdcli.models import loader

    loader.keep_freed_memory = lambda **_: None
    return networks_of(arguments, loader.load_model)


def torch_calls(arguments: argparse.Namespace, model: Any) -> dict[str, Call]:
    given = inputs(arguments.size)
    return {
        STEP: lambda: guide(model.unet(given["x"], given["t"], given["states"]).sample),
        DECODE: lambda: model.vae.decode(given["latents"]).sample,
    }


def traced_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """For converters: the name of a part, a module of tensors only, and its inputs."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Any, t: Any, states: Any) -> Any:
            return self.unet(x, t, states, return_dict=False)[0]

    class Decode(nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: Any) -> Any:
            return self.vae.decode(latents, return_dict=False)[0]

    model, given = plain_model(arguments), inputs(arguments.size)
    decoded = {"latents": given.pop("latents")}
    with torch.no_grad():
        if STEP in arguments.parts:
            yield STEP, Step(model.unet).eval(), given
        if DECODE in arguments.parts:
            yield DECODE, Decode(model.vae).eval(), decoded


def prepare_openvino(arguments: argparse.Namespace) -> None:
    import openvino

    for part, module, given in traced_parts(arguments):
        converted = openvino.convert_model(
            module,
            example_input=given,
            input=[(name, list(tensor.shape)) for name, tensor in given.items()],
        )
        openvino.save_model(converted, arguments.work / f"{part}-{arguments.size}.xml", compress_to_fp16=False)


def run_openvino(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    import openvino

    core, calls, notes = openvino.Core(), {}, {}
    number = "bf16" if arguments.worker.endswith("bf16") else "f32"
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": number,
        "INFERENCE_NUM_THREADS": arguments.threads,
    }
    given = {name: tensor.numpy() for name, tensor in inputs(arguments.size).items()}
    for part in arguments.parts:
        compiled = core.compile_model(arguments.work / f"{part}-{arguments.size}.xml", "CPU", settings)
        request, names = compiled.create_infer_request(), STEP_INPUTS if part == STEP else ["latents"]
        notes["note_precision"] = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        calls[part] = only(request.infer, [given[name] for name in names], guided=part == STEP)
    return timed(arguments, calls, started=started, version=openvino.__version__.partition("-")[0]) | notes


STEP_INPUTS = ["x", "t", "states"]


def only(infer: Callable[[Any], Any], given: Any, *, guided: bool) -> Call:
    """A call that gives the first output, guided if it is a UNet's."""

    def call() -> Any:
        output = infer(given)[0]
        return guide(output) if guided else output

    return call


def prepare_onnxruntime(arguments: argparse.Namespace) -> None:
    import torch

    for part, module, given in traced_parts(arguments):
        folder = arguments.work / f"onnx-{part}-{arguments.size}"
        folder.mkdir(exist_ok=True)
        torch.onnx.export(
            module,
            tuple(given.values()),
            folder / "model.onnx",
            input_names=list(given),
            output_names=["output"],
            opset_version=18,
            dynamo=False,
        )


def run_onnxruntime(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    given, calls = {name: tensor.numpy() for name, tensor in inputs(arguments.size).items()}, {}
    for part in arguments.parts:
        file = arguments.work / f"onnx-{part}-{arguments.size}" / "model.onnx"
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        chosen = {one.name: given[one.name] for one in session.get_inputs()}
        calls[part] = only(lambda feed, session=session: session.run(None, feed), chosen, guided=part == STEP)
    return timed(arguments, calls, started=started, version=onnxruntime.__version__)


# The floor


def run_floor(arguments: argparse.Namespace) -> dict[str, Any]:
    """The best rate of products of large float32 matrices, and the operations of a guided step and of a decode."""
    import torch

    torch.set_num_threads(arguments.threads)
    rates = []
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(8):
            begun = time.perf_counter()
            a @ b
            rates.append(2 * size**3 / (time.perf_counter() - begun) / 1e9)
    return {"gflops": max(rates), **operations(arguments)}


def operations(arguments: argparse.Namespace) -> dict[str, float]:
    """TFLOP of both parts, counted on tensors without data; a multiplication with its addition is two."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from sdcli.models.registry import load_registry

    spec = load_registry().find(MODEL)
    configs = spec.family.recipes[spec.source.architecture]()
    counted, given = {}, {name: tensor.to("meta") for name, tensor in inputs(arguments.size).items()}
    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet2DConditionModel.from_config(configs["unet"]), AutoencoderKL.from_config(configs["vae"])
        calls = {
            STEP: lambda: unet(given["x"], given["t"], given["states"]),
            DECODE: lambda: vae.decode(given["latents"]),
        }
        for part, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counted[f"{part}_tflop"] = counter.get_total_flops() / 1e12
    return counted


PREPARE = {"openvino": prepare_openvino, "onnxruntime": prepare_onnxruntime}
WORKERS = {
    "sdcli": run_sdcli,
    "diffusers": run_diffusers,
    "openvino": run_openvino,
    "onnxruntime": run_onnxruntime,
    "floor": run_floor,
}


if __name__ == "__main__":
    main()
