"""`sdcli gallery`: write a web page to browse, filter and compare the images of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.cli.ui.progress import counted
from sdcli.errors import NotFound, SdcliError, UsageError, raise_for
from sdcli.images.formats import FORMAT_OF
from sdcli.io.files import whole_file
from sdcli.request.command_line import command_line
from sdcli.request.input_files import input_files

if TYPE_CHECKING:
    from sdcli.metadata.gallery import Entry


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", readable=False, help="Folder of images, searched with its subfolders.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write, .html.", show_default="DIR/gallery.html"),
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Write an HTML page that shows the images of a folder with their settings, and print its path.

    The page works offline: filter by prompt, model and seed, sort, compare two images, copy the command that generates
    an image again. It contains thumbnails and settings, also those of A1111, ComfyUI and others; the large view loads
    the image files. Unreadable files are reported and left out.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    target = output if output is not None else folder / "gallery.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o: {target.name!r} should end in .html")
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    errors: list[SdcliError] = []
    with whole_file(target, overwrite=overwrite) as temporary:
        from sdcli.metadata.gallery import page, read_entries

        paths = [file.path for file in input_files([folder], suffixes=frozenset(FORMAT_OF), kind="pictures")]
        entries = counted(read_entries(paths), len(paths), console)
        images = _readable(entries, folder, target, console, errors, alone=len(paths) == 1)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.writelines(page(folder.resolve().name, images))
        if len(errors) == len(paths):
            raise_for(errors, of=len(paths))  # there is nothing to show, and no page
    shown = len(paths) - len(errors)
    console.result(target, path=str(target), status="done", pictures=shown, failed=len(errors))
    raise_for(errors, of=len(paths))


def _readable(
    entries: Iterable[Entry], folder: Path, target: Path, console: Console, errors: list[SdcliError], *, alone: bool
) -> Iterator[dict[str, Any]]:
    """The page's entry of each image; errors are reported at once, and added to `errors`."""
    from sdcli.metadata.gallery import entry_json

    for entry in entries:
        if entry.error is not None:
            errors.append(entry.error)
            if not alone:  # its error ends the process
                console.warn(str(entry.error))
            if console.json:
                code = entry.error.exit_code
                console.result("", path=str(entry.path), status="failed", error=str(entry.error), exit_code=code)
            continue
        request = entry.info.request if entry.info is not None else None
        yield entry_json(
            entry,
            name=entry.path.relative_to(folder).as_posix(),
            page=target,
            command=command_line(request) if request is not None else None,
        )
