"""`sdcli train-unet`: train or fine-tune the denoiser on captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import Trainer
from sdcli.models.registry import Registry
from sdcli.training.unet.settings import UnetSettings

if TYPE_CHECKING:
    from sdcli.training.unet.session import UnetSession


def _open(data: str, run: Path, settings: UnetSettings, registry: Registry) -> UnetSession:
    from sdcli.training.unet.session import UnetSession

    return UnetSession(data, run, settings, registry)


command = Trainer(
    "train-unet",
    UnetSettings,
    _open,
    data_metavar="DATA",
    data_help="A folder of captioned images, parquet files, tar shards (with braces), latents, or a hub data set.",
).command("""Train a UNet on images, so that `sdcli generate -m RUN` generates like them.

RUN is a model folder after every checkpoint. Ctrl-C finishes the step and saves; --resume goes on exactly there.
""")
