"""`sdcli train-text-encoder`: train a small CLIP text encoder with a vocabulary of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.console import Console
from sdcli.cli.options import JsonOpt, ModelsFileOpt, QuietOpt, VerboseOpt
from sdcli.cli.settings_options import settings_options
from sdcli.cli.training import Asked, ConfigOpt, DryRunOpt, OutputRunOpt, ProveOpt, ResumeOpt, Trainer, train
from sdcli.registry import load_registry
from sdcli.train_settings import TextSettings

if TYPE_CHECKING:
    from sdcli.training.text_session import TextSession


@settings_options(TextSettings)
def command(
    captions: Annotated[
        str | None,
        typer.Argument(
            metavar="CAPTIONS",
            help="A .txt (a caption a line), .jsonl, .csv or .parquet file, or a data set of pictures.",
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
    """Train a text encoder on captions; `train-unet --text-encoder RUN` builds on it.

    It learns to predict the next word, to find alternative captions alike, or what a sentence encoder says of them.
    """
    registry = load_registry(models_file)

    def open_session(data: str, run: Path, settings: TextSettings) -> TextSession:
        from sdcli.training.text_session import TextSession

        return TextSession(data, run, settings, registry)

    asked = Asked(captions, output, config, resume, dry_run, prove_resume, typed)
    trainer = Trainer("train-text-encoder", TextSettings, open_session)
    train(trainer, asked, Console(quiet=quiet, verbose=verbose, json=as_json))
