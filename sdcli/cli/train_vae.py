"""`sdcli train-vae`: train or fine-tune an autoencoder on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.training_command import TrainingCommand
from sdcli.models.registry import Registry
from sdcli.training.vae.settings import VaeSettings

if TYPE_CHECKING:
    from sdcli.training.vae.session import VaeSession


def _open(data: str, run: Path, settings: VaeSettings, registry: Registry) -> VaeSession:
    from sdcli.training.vae.session import VaeSession

    return VaeSession(data, run, settings, registry)


command = TrainingCommand(
    "train-vae",
    VaeSettings,
    _open,
    data_metavar="DATA",
    data_help="Folder of images, parquet files, tar shards (with braces), or a hub data set.",
).command("""Train or fine-tune a VAE on images without captions, for `train-unet --vae RUN`.

The scaling factor, 1 / the standard deviation of the latents, is measured at each checkpoint.
""")
