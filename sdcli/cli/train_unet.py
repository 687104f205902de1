"""`sdcli train-unet`: train or fine-tune a denoiser on captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import TrainingCommand
from sdcli.models.registry import Registry
from sdcli.training.unet.settings import UnetSettings

if TYPE_CHECKING:
    from sdcli.training.unet.session import UnetSession


def _open(data: str, run: Path, settings: UnetSettings, registry: Registry) -> UnetSession:
    from sdcli.training.unet.session import UnetSession

    return UnetSession(data, run, settings, registry)


command = TrainingCommand(
    "train-unet",
    UnetSettings,
    _open,
    data_metavar="DATA",
    data_help="Folder of captioned images, parquet files, tar shards (with braces), latents, or a hub data set.",
).command("""Train or fine-tune a UNet, or a LoRA for it, on captioned images.

RUN becomes a model folder: `sdcli generate -m RUN`. Ctrl-C finishes the step and saves a checkpoint; --resume continues
exactly there.
""")
