"""`sdcli info`: print the settings stored in images, or write copies without metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.errors import SdcliError, SomeFailed, UsageError
from sdcli.images.formats import FORMAT_OF
from sdcli.io.files import write_whole

if TYPE_CHECKING:
    from sdcli.metadata.read import ImageInfo

TOOLS = {
    "sdcli": "sdcli",
    "a1111": "A1111's text",
    "comfyui": "ComfyUI",
    "invokeai": "InvokeAI",
    "swarmui": "SwarmUI",
    "fooocus": "Fooocus",
    "novelai": "NovelAI",
    "easy-diffusion": "Easy Diffusion",
    "draw-things": "Draw Things",
}


def command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="PNG, JPEG or WebP images.")],
    strip: Annotated[
        bool, typer.Option("--strip", help="Write a copy without metadata, NAME-stripped, and print its path.")
    ] = False,
    watermark: Annotated[
        bool, typer.Option("--watermark", help="Also read the text hidden by `generate --watermark`.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write, with --strip.")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Print the settings stored in images by sdcli, A1111, ComfyUI, InvokeAI and other tools (docs/interop.md).

    --strip writes a copy without metadata instead; the pixels are not encoded again, and settings that are hidden in
    them stay, with a warning.
    """
    if (output is not None or overwrite) and not strip:
        raise UsageError(f"{'--output' if output is not None else '--overwrite'} has no effect without --strip")
    if output is not None and len(images) > 1:
        raise UsageError(f"--output is for a single copy; there are {len(images)} images")
    if watermark and strip:
        raise UsageError("--watermark has no effect with --strip")
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    failed = 0
    for path in images:
        try:
            if strip:
                _strip(path, output, console, overwrite=overwrite)
            else:
                _show(path, console, watermark=watermark)
        except SdcliError as error:
            failed += 1
            if as_json:
                console.result("", path=str(path), status="failed", error=str(error), exit_code=error.exit_code)
            if len(images) == 1:
                raise
            console.warn(str(error))
    if failed:
        raise SomeFailed(f"{failed} of {len(images)} images could not be {'stripped' if strip else 'read'}")


def _show(path: Path, console: Console, *, watermark: bool) -> None:
    from sdcli.metadata.read import read_image

    info = read_image(path)
    found: dict[str, str | None] = {}
    if watermark:
        from sdcli.images.image_files import open_image
        from sdcli.images.watermark import watermark_of

        found["watermark"] = watermark_of(open_image(path))
    provenance = info.record.provenance if info.record is not None else None
    console.result(
        "\n".join([_described(info), *(f"  {name}: {text or 'none'}" for name, text in found.items())]),
        path=str(path),
        status="ok",
        format=info.format,
        width=info.width,
        height=info.height,
        source=info.source,
        request=info.request.typed() if info.request is not None else None,
        provenance=provenance,
        parameters=info.parameters,
        unmapped=info.unmapped,
        **found,
    )


def _strip(path: Path, output: Path | None, console: Console, *, overwrite: bool) -> None:
    from sdcli.metadata.read import read_image
    from sdcli.metadata.strip import strip

    info = read_image(path)
    if output is not None and FORMAT_OF.get(output.suffix.lower()) != info.format:
        raise UsageError(f"the copy of {path} is a {info.format} image, so its name cannot be {output.name!r}")
    copy = output if output is not None else path.with_name(f"{path.stem}-stripped{path.suffix}")
    write_whole(copy, strip(path.read_bytes()), overwrite=overwrite)
    if read_image(copy).source is not None:
        console.warn(f"{copy} still has settings: they are hidden in its pixels, which stay as they are")
    console.result(str(copy), path=str(path), status="ok", stripped=str(copy))


def _described(info: ImageInfo) -> str:
    """Text for people: a line of facts, then the request, the provenance, and settings without a field of a request."""
    known = f"record: {TOOLS[info.source]}" if info.source is not None else "no settings stored"
    lines = [f"{info.path}: {info.width}x{info.height} {info.format}, {known}"]
    if info.request is not None:
        unknown = {"schema"} if "prompt" in info.request.model_fields_set else {"schema", "prompt"}
        lines += _rows({key: value for key, value in info.request.typed().items() if key not in unknown})
    if info.record is not None:
        lines += ["  provenance:", *_rows(info.record.provenance, indent=4)]
    if info.unmapped:
        lines += ["  not taken over:", *_rows(info.unmapped, indent=4)]
    return "\n".join(lines)


def _rows(fields: dict[str, Any], *, indent: int = 2) -> list[str]:
    width = max((len(key) for key in fields), default=0)
    rows = []
    for key, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *more = text.split("\n")
        label = f"{' ' * indent}{key.replace('_', ' '):<{width}}  "
        rows += [(label + first).rstrip(), *(" " * len(label) + line for line in more)]
    return rows
