"""`sdcli noise`: show the forward process of a model, an image with more and more noise."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.options.shared import (
    DeviceOpt,
    DTypeOpt,
    JsonOpt,
    ModelOpt,
    ModelsFileOpt,
    OfflineOpt,
    OverwriteOpt,
    QuietOpt,
    VerboseOpt,
)
from sdcli.cli.plot import FORMATS
from sdcli.cli.ui.console import Console
from sdcli.errors import UsageError
from sdcli.generation.settings import RunSettings
from sdcli.io.files import check_new, check_new_png, whole_file
from sdcli.models.registry import load_registry
from sdcli.request.schema import MAX_SEED

if TYPE_CHECKING:
    from sdcli.generation.forward_process import ForwardProcess, Level

STEPS = 8
"""Number of timesteps unless chosen."""
MOST_COLUMNS = 10
SMALL = 64
"""Pixels a side; smaller images are enlarged towards it."""


def command(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image, cropped to the size of the model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, .png.")],
    model: ModelOpt = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="T,...", help="Timesteps to show, 0 to 999 for most models."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Number of equally spaced timesteps to show.", show_default=str(STEPS)),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the noise.")] = 0,
    curves: Annotated[
        Path | None,
        typer.Option("--curves", metavar="FILE", help="Also draw the noise schedule to this .png, .svg or .pdf file."),
    ] = None,
    overwrite: OverwriteOpt = False,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    models_file: ModelsFileOpt = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Show the forward process of a model: an image with the noise of chosen training timesteps.

    The image is encoded with the model's VAE, mixed with noise, and decoded. Below each image are the timestep t,
    alpha-bar (the remaining share of the signal's variance) and the signal-to-noise ratio. --curves draws these and
    beta over all timesteps. Models without a VAE add noise to the pixels.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    if at is not None and steps is not None:
        raise UsageError("use either --at or --steps")
    chosen = _timesteps(at) if at is not None else None
    check_new_png(output, flag="-o", overwrite=overwrite)
    if curves is not None:
        if curves.suffix.lower() not in FORMATS:
            raise UsageError(f"--curves: {curves.name!r} should end in {', '.join(FORMATS)}")
        if curves.resolve() == output.resolve():
            raise UsageError("-o and --curves name the same file")
        check_new(curves, overwrite=overwrite)
    spec = load_registry(models_file).find(model)

    from sdcli.generation.forward_process import ForwardProcess
    from sdcli.images.contact_sheet import check_size, contact_sheet, write_sheet
    from sdcli.images.image_files import open_image
    from sdcli.images.pixels import to_pixels

    opened = open_image(image)
    console.note(f"loading {spec.name}")
    process = ForwardProcess.of(spec, RunSettings(device=device, dtype=dtype, offline=offline))
    timesteps = chosen if chosen is not None else process.spread(steps or min(STEPS, len(process)))
    process.check(timesteps)
    fitted = process.fitted(opened)
    enlarge = max(1, SMALL // fitted.width)
    check_size(len(timesteps), fitted.size, label_lines=3, enlarge=enlarge)
    x0, notes = process.encode(to_pixels(fitted))
    shown = []
    for x in process.noised(x0, timesteps, seed=seed):
        decoded, more = process.decode(x)
        shown.append(decoded)
        notes += more
    for note in dict.fromkeys(notes):
        console.warn(note)
    levels = [process.level(t) for t in timesteps]
    strip = contact_sheet(
        shown,
        columns=min(len(shown), MOST_COLUMNS),
        labels=[_label(level) for level in levels],
        label_lines=3,
        enlarge=enlarge,
    )
    numbers = [_numbers(level) for level in levels]
    facts = {"picture": image.name, "model": process.spec.name, "seed": seed, "levels": numbers}
    write_sheet(output, strip, facts, overwrite=overwrite)
    if curves is not None:
        _draw(process, timesteps, curves, overwrite=overwrite)
    text = str(output) if curves is None else f"{output}\n{curves}"
    console.result(
        text,
        status="ok",
        path=str(output),
        curves=str(curves) if curves is not None else None,
        model=process.spec.name,
        width=fitted.width,
        height=fitted.height,
        seed=seed,
        timesteps=len(process),
        levels=numbers,
    )


def _timesteps(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            raise UsageError(f"--at takes timesteps with commas between, such as 0,100,999, not {text!r}")
    return [int(part) for part in parts]


def _label(level: Level) -> str:
    snr = f"SNR {level.snr_db:.1f} dB" if math.isfinite(level.snr_db) else "no signal"
    return f"t {level.t}\nalpha-bar {level.alpha_bar:.4g}\n{snr}"


def _numbers(level: Level) -> dict[str, Any]:
    """JSON-ready: without infinity, and with the seven digits that float32 has."""
    return {
        name: value if isinstance(value, int) else float(f"{value:.7g}") if math.isfinite(value) else None
        for name, value in asdict(level).items()
    }


def _draw(process: ForwardProcess, timesteps: list[int], path: Path, *, overwrite: bool) -> None:
    from sdcli.training.plot import draw_schedule, save_figure

    figure = draw_schedule(
        process.betas.numpy(), process.schedule.alphas_cumprod.numpy(), name=process.spec.name, marked=timesteps
    )
    with whole_file(path, overwrite=overwrite) as temporary:
        save_figure(figure, temporary, format=FORMATS[path.suffix.lower()])
