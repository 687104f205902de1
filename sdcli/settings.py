"""How a run is carried out: nothing in here is meant to change a picture (that is `request.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ImageFormat = Literal["png", "jpeg", "webp"]

DEFAULT_TEMPLATE = "{index:05}-{seed}-{prompt}"


@dataclass(frozen=True)
class RunSettings:
    """Where and how to compute: device, dtype, batch, network."""

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    """Pictures per batch; None lets the engine decide from size and device, the same way every time."""
    offline: bool = False
    safety: Literal["auto", "off"] = "auto"
    """Whether a model's own safety checker looks at the pictures, where it ships one."""
    strict_prompt: bool = False
    """Refuse a prompt that does not fit the text encoder, instead of saying what was cut."""
    lora_dir: Path | None = None
    """Where LoRAs are looked up by name; None is the user's own folder."""


@dataclass(frozen=True)
class OutputSettings:
    """Where and in what form pictures are written."""

    outdir: Path = Path("outputs")
    template: str = DEFAULT_TEMPLATE
    """A file name or a template, relative to `outdir`; see `naming.py` for its fields."""
    format: ImageFormat = "png"
    overwrite: bool = False
    metadata: bool = True
    resume: bool = False


SUFFIX_OF: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
