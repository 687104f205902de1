"""Which family a single-file checkpoint is of, told by the names of its tensors: the original LDM keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sdcli.io.json_files import parse_json

MAX_HEADER_BYTES = 20_000_000


@dataclass(frozen=True)
class SingleFileLayout:
    """Where the parts stand in one family's files, and what those files do not say themselves."""

    family: Literal["sd1", "sd2", "sdxl"]
    title: str
    configs: tuple[str, ...]
    """Folders of the package with the parts' configurations, the later laid over the earlier."""
    prefixes: Mapping[str, str]
    """Part -> what its tensors' names begin with."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What such models like, for a request that leaves it open."""

    def has_open_clip(self, part: str) -> bool:
        """Whether a text encoder is OpenCLIP's, which has names and a padding of its own."""
        return self.prefixes[part].endswith(".model.")


_UNET_AND_VAE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_LARGE = {"width": 1024, "height": 1024, "guidance_scale": 7.0}
SD1 = SingleFileLayout(
    "sd1",
    "SD 1.x",
    ("sd1",),
    {**_UNET_AND_VAE, "text_encoder": "cond_stage_model.transformer."},
)
SD2 = SingleFileLayout(
    "sd2",
    "SD 2.x",
    ("sd1", "sd2"),
    {**_UNET_AND_VAE, "text_encoder": "cond_stage_model.model."},
)
SDXL = SingleFileLayout(
    "sdxl",
    "SDXL",
    ("sdxl",),
    {
        **_UNET_AND_VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    _LARGE,
)
SDXL_REFINER = SingleFileLayout(
    "sdxl",
    "SDXL refiner",
    ("sdxl", "sdxl_refiner"),
    {**_UNET_AND_VAE, "text_encoder_2": "conditioner.embedders.0.model."},
    _LARGE,
)


def layout_of(names: Iterable[str]) -> SingleFileLayout:
    """The layout of a file with tensors of these names; that of SD 1.x where nothing speaks for another."""
    names = list(names)
    for layout, start in (
        (SDXL_REFINER, "conditioner.embedders.0.model."),
        (SDXL, "conditioner."),
        (SD2, "cond_stage_model.model."),
    ):
        if any(name.startswith(start) for name in names):
            return layout
    return SD1


def layout_in(path: Path) -> SingleFileLayout | None:
    """The layout of a .safetensors file; None for a file that is no such or damaged, which loading tells."""
    try:
        status = path.stat()
        return _layout_in(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def _layout_in(path: Path, changed: int, size: int) -> SingleFileLayout:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size):
            raise ValueError("no safetensors header")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no table of tensors")
    return layout_of(header)
