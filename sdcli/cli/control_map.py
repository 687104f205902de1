"""The `control-map` command: an image as a ControlNet sees it, saved."""

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
            help="canny: thin edges. scribble: thick strokes. softedge: soft slopes. blur, tile: without detail. "
            "palette: blocks of colour. depth: a depth map at hand, stretched to black and white.",
        ),
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE|-", help="The image; - reads it from stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The map: a .png file.")],
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="Width and height (the image's own).", show_default=False),
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Save the map that `generate --control HOW:MODEL=IMAGE` shows to a ControlNet.

    At the size of the image to be generated it is that map to the bit: --control MODEL=FILE then generates the same.
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
    console.result(str(output), path=str(output), how=how, width=made.width, height=made.height)
