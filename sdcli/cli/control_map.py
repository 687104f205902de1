"""`sdcli control-map`: compute the map that a ControlNet gets from an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.io.files import check_new_png, write_whole
from sdcli.request.fields import MapMaker
from sdcli.request.schema import parse_size


def command(
    how: Annotated[
        MapMaker,
        typer.Argument(
            metavar="HOW",
            help="Kind of map: canny (thin edges), scribble (thick strokes), softedge (soft edges), blur or tile (no "
            "details), palette (blocks of colour), depth (a given depth map, stretched to black and white).",
        ),
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE|-", help="Image file, or - for stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, .png.")],
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="Width and height in pixels.", show_default="those of the image"),
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Write the map that `generate --control HOW:MODEL=IMAGE` passes to a ControlNet.

    At the size of the generated image it is the same map, bit for bit: --control MODEL=FILE generates the same image.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    check_new_png(output, flag="-o", overwrite=overwrite)
    wanted = parse_size(size) if size is not None else None
    if wanted is not None and not all(8 <= side <= 8192 for side in wanted):
        raise UsageError(f"--size: each side should be from 8 to 8192, not {size}")
    from sdcli.images.image_files import image_from_bytes
    from sdcli.images.preprocessors import control_map
    from sdcli.metadata.embed import image_bytes
    from sdcli.request.input_files import read_input

    made = control_map(image_from_bytes(read_input(image), name=image), how, wanted)
    write_whole(output, image_bytes(made, "png", None), overwrite=overwrite)
    console.result(output, path=str(output), how=how, width=made.width, height=made.height)
