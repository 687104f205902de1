"""`sdcli train-text-encoder`: train a small CLIP text encoder with a vocabulary of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import TrainingCommand
from sdcli.models.registry import Registry
from sdcli.training.text_encoder.settings import TextSettings

if TYPE_CHECKING:
    from sdcli.training.text_encoder.session import TextSession


def _open(data: str, run: Path, settings: TextSettings, registry: Registry) -> TextSession:
    from sdcli.training.text_encoder.session import TextSession

    return TextSession(data, run, settings, registry)


command = TrainingCommand(
    "train-text-encoder",
    TextSettings,
    _open,
    data_metavar="CAPTIONS",
    data_help="Captions: a .txt (one per line), .jsonl, .csv or .parquet file, or a data set of images.",
).command("""Train a small text encoder on captions, for `train-unet --text-encoder RUN`.

It learns the vectors of a sentence encoder (distil), or alternative captions of what a model knows (align).
""")
