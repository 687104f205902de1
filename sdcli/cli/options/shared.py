"""The options that several commands share, each spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.generation.settings import Device, DType

ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A name from `sdcli models list`, a diffusers folder, a .safetensors file, or owner/name(@revision).",
    ),
]
ModelsFileOpt = Annotated[
    Path | None, typer.Option("--models-file", metavar="FILE", help="A models.yaml laid over the others.")
]
DeviceOpt = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes cuda, mps or cpu.")]
DTypeOpt = Annotated[
    DType, typer.Option("--dtype", help="Number format; auto takes what is quick and safe on the device.")
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Results as JSON, one object a line.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results and warnings.")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show tracebacks.")]
