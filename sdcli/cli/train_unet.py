"""`sdcli train-unet`: train or fine-tune the denoiser on captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.console import Console
from sdcli.cli.options import JsonOpt, ModelsFileOpt, QuietOpt, VerboseOpt
from sdcli.cli.settings_options import settings_options
from sdcli.cli.training import Asked, ConfigOpt, DryRunOpt, OutputRunOpt, ProveOpt, ResumeOpt, Trainer, train
from sdcli.registry import load_registry
from sdcli.train_settings import UnetSettings

if TYPE_CHECKING:
    from sdcli.training.unet_session import UnetSession


@settings_options(UnetSettings)
def command(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A folder of captioned pictures, parquet files, tar shards (with braces), latents, or a hub data set.",
            show_default=False,
        ),
    ] = None,
    output: OutputRunOpt = None,
    config: ConfigOpt = None,
    resume: ResumeOpt = False,
    dry_run: DryRunOpt = False,
    prove_resume: ProveOpt = False,
    models_file: ModelsFileOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
    *,
    typed: dict[str, Any],
) -> None:
    """Train a UNet on pictures, so that `sdcli generate -m RUN` paints like them.

    RUN is a model folder after every checkpoint. Ctrl-C finishes the step and saves; --resume goes on exactly there.
    """
    registry = load_registry(models_file)

    def open_session(data: str, run: Path, settings: UnetSettings) -> UnetSession:
        from sdcli.training.unet_session import UnetSession

        return UnetSession(data, run, settings, registry)

    asked = Asked(data, output, config, resume, dry_run, prove_resume, typed)
    train(Trainer("train-unet", UnetSettings, open_session), asked, Console(quiet=quiet, verbose=verbose, json=as_json))
