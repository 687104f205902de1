"""Settings of `sdcli train-controlnet`, in addition to those that all trainers share."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from sdcli.request.fields import MapMaker
from sdcli.training.settings import DATA, MODEL, DenoiserSettings, setting


class ControlNetSettings(DenoiserSettings):
    """Settings of `sdcli train-controlnet`."""

    model: str | None = setting(
        None, "model that the ControlNet guides, itself not trained (default: the embedded model)", MODEL
    )
    controlnet: str | None = setting(
        None, "ControlNet to fine-tune: a name, a folder or a file (default: a new one, copied from the UNet)", MODEL
    )

    conditioning_image_column: str | None = setting(
        None, "column with the map of each image (default: conditioning_image)", DATA
    )
    conditioning_data_dir: str | None = setting(None, "folder with the maps, named like the images", DATA)
    preprocessor: MapMaker | None = setting(None, "make the maps from the images with this preprocessor", DATA)

    @model_validator(mode="after")
    def _every_controlnet_setting_has_an_effect(self) -> Self:
        names = ("conditioning_image_column", "conditioning_data_dir", "preprocessor")
        typed = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(typed) > 1:
            raise ValueError(f"{' and '.join(typed)} are both sources of maps; give one")
        return self
