"""The programs that run a converted model: OpenVINO and ONNX Runtime."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from peer_programs.common import STEP, Call, Figures, guide, inputs, timed
from peer_programs.networks import traced_parts

STEP_INPUTS = ["x", "t", "states"]


def prepare_openvino(arguments: argparse.Namespace) -> None:
    import openvino

    for part, module, given in traced_parts(arguments):
        converted = openvino.convert_model(
            module,
            example_input=given,
            input=[(name, list(tensor.shape)) for name, tensor in given.items()],
        )
        openvino.save_model(converted, arguments.work / f"{part}-{arguments.size}.xml", compress_to_fp16=False)


def run_openvino(arguments: argparse.Namespace) -> Figures:
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
            dynamo=True,
            external_data=True,
        )


def run_onnxruntime(arguments: argparse.Namespace) -> Figures:
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
