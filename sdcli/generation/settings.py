"""How a run is carried out: device, batch size, output. Nothing in here is meant to change an image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from sdcli.errors import UsageError
from sdcli.images.formats import ImageFormat

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

TraceFormat = Literal["webp", "apng", "gif"]

DEFAULT_TEMPLATE = "{index:05}-{seed}-{prompt}"


@dataclass(frozen=True)
class RunSettings:
    """Where and how to compute: device, dtype, batch, network."""

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    """Images per batch; None chooses by size and device, the same way every time."""
    offline: bool = False
    safety: Literal["auto", "off"] = "auto"
    """Whether a model's own safety checker looks at the images, where it ships one."""
    strict_prompt: bool = False
    """Refuse a prompt that does not fit the text encoder, instead of saying what was cut."""
    lora_dir: Path | None = None
    """Where LoRAs are looked up by name; None is the user's own folder."""
    attention: str = "auto"
    """How self-attention is computed in half precision on the CPU: sliced, sdpa, or whichever is quicker there."""


@dataclass(frozen=True)
class TraceSettings:
    """Which steps of the denoising are kept beside an image, and in what form they move."""

    steps: int | tuple[int, ...] | None = 8
    """So many, evenly spread; or these, counted from 1; None is all of them."""
    format: TraceFormat = "webp"

    @classmethod
    def of(cls, text: str, format: TraceFormat) -> Self:
        """From `8`, `1,5,20` or `all`. Raises UsageError."""
        numbers = [int(number) for number in re.findall(r"\d+", text)] if _STEPS.fullmatch(text) else []
        if text != "all" and (not numbers or 0 in numbers):
            raise UsageError(
                f"--trace takes how many steps to show, such as 8, or which ones, such as 1,5,20, or all; not {text!r}"
            )
        if text == "all":
            return cls(None, format)
        return cls(tuple(numbers) if "," in text else numbers[0], format)


_STEPS = re.compile(r"[0-9]{1,4}(?:,[0-9]{1,4})*,?")


@dataclass(frozen=True)
class OutputSettings:
    """Where and in what form images are written."""

    outdir: Path = Path("outputs")
    template: str = DEFAULT_TEMPLATE
    """A file name or a template, relative to `outdir`; see `naming.py` for its fields."""
    format: ImageFormat = "png"
    overwrite: bool = False
    metadata: bool = True
    resume: bool = False
    trace: TraceSettings | None = None
    heatmap: tuple[str, ...] | None = None
    """The words and phrases whose attention maps are written; empty for every word, None for no maps."""

    def beside(self, image: Path) -> list[Path]:
        """The files that stand beside an image that is finished; where there are more, these are the last ones."""
        suffixes = [".trace.png", f".trace.{self.trace.format}"] if self.trace is not None else []
        suffixes += [".heatmap/index.html"] if self.heatmap is not None else []
        return [image.parent / f"{image.stem}{suffix}" for suffix in suffixes]
