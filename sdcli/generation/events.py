"""The events of generating: progress, notes, and what became of each job. Every event names the jobs it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdcli.errors import SdcliError
from sdcli.generation.resolve.jobs import ResolvedJob

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SideFile = tuple[str, bytes]
"""The part of a file's name that follows the image's stem, and the file's content."""


@dataclass(frozen=True)
class Phase:
    """Something that takes time begins; `steps` is 0 where the length is unknown."""

    name: Literal["wait", "load", "encode", "denoise", "decode", "save", "explain"]
    jobs: tuple[int, ...]
    """Indices of jobs."""
    detail: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Progress:
    """Denoising step number `index` (from 0) of `count` is done."""

    jobs: tuple[int, ...]
    index: int
    count: int
    preview: Callable[..., Image.Image | None]
    """Computes an image of the x0 prediction of this step, which takes time; with `exact=True` in full size by the VAE.

    None where memory runs out. `decoded` in the image's `info` says in a few words how.
    """
    previews: Callable[..., list[Image.Image]] = list
    """The same as an image for each of `jobs`, in their order; none where memory runs out."""


@dataclass(frozen=True)
class Note:
    """A sentence for the user: a fallback, a prompt that was cut, a LoRA that fits in part."""

    text: str
    jobs: tuple[int, ...]


class _OfOneJob:
    job: ResolvedJob

    @property
    def jobs(self) -> tuple[int, ...]:
        """The index of the job."""
        return (self.job.index,)


@dataclass(frozen=True)
class Generated(_OfOneJob):
    """An image is decoded and finished. `pixels` [3, H, W] in 0..1, float32 on the CPU."""

    job: ResolvedJob
    pixels: Tensor
    batch_size: int
    """Images that were denoised together."""
    batch_index: int
    """The image's place among them."""
    seconds: float
    """An equal share of the time of those that were denoised together, and the time of decoding this one."""
    fallbacks: tuple[str, ...] = ()
    side_files: Iterable[SideFile] = ()
    """Files that explain the image, computed one by one when iterated. Raises OutOfMemory, BadOutput and UsageError."""


@dataclass(frozen=True)
class Failed(_OfOneJob):
    """A job has no image. The other jobs of its batch continue."""

    job: ResolvedJob
    error: SdcliError
    flagged: bool = False
    """Whether it is the safety checker that kept the image back."""


@dataclass(frozen=True)
class Cancelled(_OfOneJob):
    """A job left its batch because it was cancelled."""

    job: ResolvedJob


BatchEvent = Phase | Progress | Note | Generated | Failed | Cancelled
"""What `run_batch` yields: exactly one Generated, Failed or Cancelled for each wanted job."""


@dataclass(frozen=True)
class Result(_OfOneJob):
    """The end of one job; `path` and its side files are whole on the disk when this is yielded."""

    status: Literal["done", "skipped", "failed", "flagged", "cancelled"]
    job: ResolvedJob
    path: Path | None = None
    seconds: float = 0.0
    fallbacks: tuple[str, ...] = ()
    error: SdcliError | None = None
    side_files: tuple[Path, ...] = ()


Event = Phase | Progress | Note | Result
"""What `service.generate` yields: exactly one Result for each job."""
