"""Options that several commands share."""

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
        help="Name from `sdcli models list`, diffusers folder, .safetensors file, or owner/name[@revision] of the "
        "Hugging Face hub (default: see `sdcli models default`).",
    ),
]
ModelsFileOpt = Annotated[
    Path | None, typer.Option("--models-file", metavar="FILE", help="Read further models from this models.yaml.")
]
DeviceOpt = Annotated[Device, typer.Option("--device", help="Device; auto: cuda, else mps, else cpu.")]
DTypeOpt = Annotated[
    DType,
    typer.Option("--dtype", help="Number format; auto: the fastest that is safe on the device."),
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Do not use the network.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print results as JSON, one object per line.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and warnings, no progress.")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="Print more details, and tracebacks of errors.")]
ShardOpt = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        rich_help_panel="The run",
        help="Carry out part I (from 1) of the N parts of this run, which other processes or machines with the same "
        "command divide among them; together they write the files of one run.",
    ),
]
