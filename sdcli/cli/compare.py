"""`sdcli compare`: measure how much two images differ, and list the differences of their settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.info import TOOLS
from sdcli.cli.options.shared import JsonOpt, OverwriteOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.errors import BadOutput, UsageError
from sdcli.io.files import check_new_png, write_whole

if TYPE_CHECKING:
    from PIL import Image

    from sdcli.images.metrics import Distance
    from sdcli.metadata.compare import Differences
    from sdcli.metadata.read import ImageInfo

LONGEST_LINE = 100
"""Characters of two values on one line; longer ones are put below each other."""


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A PNG, JPEG or WebP image.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another image.")],
    diff: Annotated[
        Path | None,
        typer.Option(
            "--diff",
            metavar="FILE",
            help="Write the difference of the pixels to this .png, scaled so that the largest is 255.",
        ),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            "--min-psnr",
            metavar="DB",
            min=0,
            help="Exit with code 6 if the PSNR in dB is lower; inf: if any pixel differs.",
        ),
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Measure how much two images differ, and list the differences of their settings.

    Pixels are compared in RGB, upright and on white: largest and mean difference (0 to 255), PSNR and SSIM. Settings
    are the stored requests, also those of other tools, and the provenance.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if overwrite and diff is None:
        raise UsageError("--overwrite has no effect without --diff")
    if diff is not None:
        check_new_png(diff, flag="--diff", overwrite=overwrite)

    from sdcli.images.image_files import open_image
    from sdcli.images.metrics import distance, similarity
    from sdcli.metadata.compare import differing_facts, differing_request
    from sdcli.metadata.read import read_image

    infos = read_image(a), read_image(b)
    images = open_image(a), open_image(b)
    apart, ssim = distance(*images), similarity(*images)
    if diff is not None and apart is None and min_psnr is None:
        raise UsageError(f"--diff needs images of equal size; {a} is {_size(images[0])}, {b} {_size(images[1])}")
    factor = 1.0
    if diff is not None and apart is not None:
        factor = _write_difference(diff, images, apart, overwrite=overwrite)
    request, facts = differing_request(*infos), differing_facts(*infos)
    sides = [_facts(info, image) for info, image in zip(infos, images, strict=True)]
    lines = [*map(_side, sides), _pixels(apart, ssim), *_table("request", request), *_table("provenance", facts)]
    console.result(
        "\n".join(lines),
        status="ok",
        a=sides[0],
        b=sides[1],
        identical=apart is not None and apart.largest == 0,
        max_difference=apart.largest if apart is not None else None,
        mean_difference=round(apart.mean, 6) if apart is not None else None,
        psnr=round(apart.psnr, 4) if apart is not None and math.isfinite(apart.psnr) else None,
        ssim=round(ssim, 6) if ssim is not None else None,
        request=request,
        provenance=facts,
        diff=str(diff) if diff is not None and apart is not None else None,
    )
    if diff is not None and apart is not None:
        console.note(f"{diff} shows the differences, multiplied by {factor:g}")
    if min_psnr is not None and apart is None:
        raise BadOutput("the images differ in size, so their PSNR is undefined")
    if min_psnr is not None and apart is not None and apart.psnr < min_psnr:
        raise BadOutput(f"the PSNR is {apart.psnr:.2f} dB, less than --min-psnr {min_psnr:g}")


def _write_difference(
    path: Path, images: tuple[Image.Image, Image.Image], apart: Distance, *, overwrite: bool
) -> float:
    """Write |a - b|, amplified, and return how many times."""
    from sdcli.metadata.compare import difference_image
    from sdcli.metadata.embed import image_bytes

    factor = 255 / apart.largest if apart.largest else 1.0
    image = difference_image(*images, factor=factor)
    write_whole(path, image_bytes(image, "png", None), overwrite=overwrite)
    return factor


def _facts(info: ImageInfo, image: Image.Image) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "width": image.width,
        "height": image.height,
        "format": info.format,
        "source": info.source,
    }


def _side(facts: dict[str, Any]) -> str:
    known = f"record: {TOOLS[facts['source']]}" if facts["source"] is not None else "no record"
    return f"{facts['path']}: {facts['width']}x{facts['height']} {facts['format']}, {known}"


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _pixels(apart: Distance | None, ssim: float | None) -> str:
    if apart is None:
        return "pixels: different sizes"
    if not apart.largest:
        return "pixels: identical"
    structure = f", SSIM {ssim:.4f}" if ssim is not None else ""
    return (
        f"pixels: differ by up to {apart.largest} of 255, by {apart.mean:.3g} in the mean; "
        f"PSNR {apart.psnr:.2f} dB{structure}"
    )


def _table(title: str, differences: Differences | None) -> list[str]:
    """A line per field that differs, or the reason why there is none."""
    if not differences:
        return [f"{title}: {'identical' if differences is not None else 'not stored in both images'}"]
    width = max(map(len, differences))
    rows = [f"{title}:"]
    for name, pair in differences.items():
        label = f"  {name.replace('_', ' '):<{width}}  "
        one, other = ("-" if value is None else json.dumps(value, ensure_ascii=False) for value in pair)
        apart = "  ->  " if len(one) + len(other) <= LONGEST_LINE else "\n" + " " * len(label)
        rows.append(f"{label}{one}{apart}{other}")
    return rows
