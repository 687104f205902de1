"""`sdcli train-vae`: train or fine-tune the autoencoder between pictures and latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.console import Console
from sdcli.cli.options import JsonOpt, ModelsFileOpt, QuietOpt, VerboseOpt
from sdcli.cli.settings_options import settings_options
from sdcli.cli.training import Asked, ConfigOpt, DryRunOpt, OutputRunOpt, ProveOpt, ResumeOpt, Trainer, train
from sdcli.registry import load_registry
from sdcli.train_settings import VaeSettings

if TYPE_CHECKING:
    from sdcli.training.vae_session import VaeSession


@settings_options(VaeSettings)
def command(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A folder of pictures, parquet files, tar shards (with braces), or a hub data set.",
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
    """Train a VAE on pictures; captions are not needed. `train-unet --vae RUN` builds on it.

    Its scaling factor, 1 / the latents' standard deviation, is measured at each checkpoint and stands in its config.
    """
    registry = load_registry(models_file)

    def open_session(data: str, run: Path, settings: VaeSettings) -> VaeSession:
        from sdcli.training.vae_session import VaeSession

        return VaeSession(data, run, settings, registry)

    asked = Asked(data, output, config, resume, dry_run, prove_resume, typed)
    train(Trainer("train-vae", VaeSettings, open_session), asked, Console(quiet=quiet, verbose=verbose, json=as_json))
