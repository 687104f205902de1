"""`sdcli train-controlnet`: train a ControlNet for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import TrainingCommand
from sdcli.models.registry import Registry
from sdcli.training.controlnet.settings import ControlNetSettings

if TYPE_CHECKING:
    from sdcli.training.controlnet.session import ControlNetSession


def _open(data: str, run: Path, settings: ControlNetSettings, registry: Registry) -> ControlNetSession:
    from sdcli.training.controlnet.session import ControlNetSession

    return ControlNetSession(data, run, settings, registry)


command = TrainingCommand(
    "train-controlnet",
    ControlNetSettings,
    _open,
    data_metavar="DATA",
    data_help="Captioned images: folder, parquet files, tar shards (with braces), or hub data set.",
).command("""Train a ControlNet, which guides a model by maps of edges, strokes, depth and the like.

The maps come from the column conditioning_image of metadata.jsonl or parquet files, from --conditioning-data-dir
(another folder with the same file names), or are computed from the images, with --preprocessor canny. The model itself
is not trained. Use the result with `sdcli generate -m MODEL --control RUN=MAP.png`; diffusers loads RUN/controlnet.
""")
