"""`sdcli grid`: lay images out on a contact sheet, labelled by the settings in which they differ."""

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
        typer.Argument(metavar="IMAGE_OR_FOLDER", readable=False, help="PNG, JPEG or WebP images, or folders of them."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, .png.")],
    columns: Annotated[
        int | None,
        typer.Option("--columns", min=1, help="Images per row.", show_default="as many as rows"),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="FIELDS",
            help=f"Text below each image: fields separated by commas, or none. Fields: {', '.join(SHORT)}.",
            show_default="the fields that differ, else the file names",
        ),
    ] = None,
    enlarge: Annotated[int, typer.Option("--enlarge", min=1, max=64, help="Factor by which pixels are enlarged.")] = 1,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Lay images out on a contact sheet with labels, and print its path.

    Labels are made from the settings stored in the images, also those of other tools. The PNG text chunk
    `sdcli-sheet` lists the images. Unreadable images are reported and left out.
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
        raise NotFound(f"there are no images besides {output}, the file to write")

    from sdcli.images.contact_sheet import about_labels, check_size, contact_sheet, write_sheet
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
    beside = write_sheet(output, sheet, {"pictures": on_it}, overwrite=overwrite)
    if beside:
        console.warn(about_labels(beside))
    texts = labels if labels is not None else [None] * len(shown)
    console.result(
        output,
        status="ok",
        path=str(output),
        width=sheet.width,
        height=sheet.height,
        pictures=[{"path": str(file.path), "label": text} for (file, _), text in zip(shown, texts, strict=True)],
        failed=[str(error) for error in errors],
    )
    raise_for(errors, of=len(files))
