"""The `grid` command: finished images on one contact sheet, labelled by what tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.errors import BadImage, NotFound, SdcliError, raise_for
from sdcli.images.formats import FORMAT_OF
from sdcli.images.sheet_labels import SHORT, labels_of, parse_fields
from sdcli.io.files import check_new_png
from sdcli.request.input_files import input_files

LABEL_LINES = 3


def command(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE_OR_FOLDER", readable=False, help="PNG, JPEG or WebP images; folders of them."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The sheet: a .png file.")],
    columns: Annotated[
        int | None,
        typer.Option(
            "--columns", min=1, help="Images in a row; without it as many as there are rows.", show_default=False
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="FIELDS",
            help=f"What stands below each: some of {', '.join(SHORT)} with commas between, or none. "
            "Without it what differs between the images, or else their names.",
            show_default=False,
        ),
    ] = None,
    enlarge: Annotated[int, typer.Option("--enlarge", min=1, max=64, help="Show each pixel as so many a side.")] = 1,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Lay finished images out on one sheet, each with a label, and print the sheet's path.

    The labels come from the images' own records, other tools' too. What is on the sheet stands in its text chunk
    `sdcli-sheet`. An image that cannot be read is reported, and the others are laid out.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    check_new_png(output, flag="-o", overwrite=overwrite)
    fields = parse_fields(label) if label not in (None, "none") else None
    files = [
        file
        for file in input_files(images, suffixes=frozenset(FORMAT_OF), kind="pictures")
        if file.path.resolve() != output.resolve()  # the sheet of an earlier run, in the folder that it shows
    ]
    if not files:
        raise NotFound(f"there is no image but {output}, which is to be written")

    from sdcli.images.contact_sheet import check_size, contact_sheet, write_sheet
    from sdcli.images.image_files import upright_rgb
    from sdcli.metadata.read import image_and_info

    shown, loaded, errors, largest = [], [], list[SdcliError](), (0, 0)
    for file in files:
        try:
            with image_and_info(file.path) as (opened, info):
                image = upright_rgb(opened)
        except (BadImage, NotFound) as error:
            if len(files) > 1:
                console.warn(str(error))
            errors.append(error)
            continue
        shown.append((file, info.request))
        loaded.append(image)
        largest = max(largest[0], image.width), max(largest[1], image.height)
        check_size(len(loaded), largest, label_lines=LABEL_LINES, enlarge=enlarge)
    if not loaded:
        raise_for(errors, of=len(files))
    labels = None
    if label != "none":
        labels = labels_of([str(file.name) for file, _ in shown], [request for _, request in shown], fields=fields)
    sheet = contact_sheet(loaded, columns=columns, labels=labels, label_lines=LABEL_LINES, enlarge=enlarge)
    requests = [request.typed() if request is not None else None for _, request in shown]
    on_it = [{"name": file.path.name, "request": request} for (file, _), request in zip(shown, requests, strict=True)]
    write_sheet(output, sheet, {"pictures": on_it}, overwrite=overwrite)
    said = labels if labels is not None else [None] * len(shown)
    console.result(
        str(output),
        status="ok",
        path=str(output),
        width=sheet.width,
        height=sheet.height,
        pictures=[{"path": str(file.path), "label": text} for (file, _), text in zip(shown, said, strict=True)],
        failed=[str(error) for error in errors],
    )
    raise_for(errors, of=len(files))
