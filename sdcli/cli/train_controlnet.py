"""`sdcli train-controlnet`: teach a network to guide a model by a map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import Trainer
from sdcli.models.registry import Registry
from sdcli.training.controlnet.settings import ControlNetSettings

if TYPE_CHECKING:
    from sdcli.training.controlnet.session import ControlNetSession


def _open(data: str, run: Path, settings: ControlNetSettings, registry: Registry) -> ControlNetSession:
    from sdcli.training.controlnet.session import ControlNetSession

    return ControlNetSession(data, run, settings, registry)


command = Trainer(
    "train-controlnet",
    ControlNetSettings,
    _open,
    data_metavar="DATA",
    data_help="Captioned images: a folder, parquet files, tar shards (with braces), or a hub data set.",
).command("""Train a ControlNet, which guides a model by a map: edges, strokes, depth, whatever is beside the images.

The maps come from the column conditioning_image of metadata.jsonl or parquet files, from --conditioning-data-dir (the
same names in another folder), or with --preprocessor canny from the images themselves. The model stays as it is.
`sdcli generate -m MODEL --control RUN=MAP.png` generates with the result, and diffusers loads RUN/controlnet.
""")
