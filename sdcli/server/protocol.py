"""The messages between the server and its worker processes; plain values that are pickled on a private pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sdcli.generation.plan import Limits
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.images.formats import ImageFormat

FailureKind = Literal[
    "cancelled", "timeout", "flagged", "out_of_memory", "bad_request", "not_found", "worker_died", "error"
]


@dataclass(frozen=True)
class Part:
    """The images of one job. Their indices count from 0."""

    id: str
    images: tuple[ResolvedJob, ...]
    format: ImageFormat = "png"
    preview_every: float | None = None
    """Seconds between latent previews; None sends none for their time."""
    partial_images: int = 0
    """Whole images decoded from the x0 prediction, spread evenly over the steps."""
    quality: int | None = None
    """The quality of JPEG and WebP, 0..100; None is that of `sdcli generate`."""


@dataclass(frozen=True)
class Generate:
    """Generate the images of a job, or of several jobs that are planned into batches together."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Cancel:
    """Stop generating these images of a job between steps; None is all of them."""

    id: str
    images: frozenset[int] | None = None


@dataclass(frozen=True)
class Lend:
    """Generate for a command of this machine, whose connection follows on the pipe."""

    id: str


@dataclass(frozen=True)
class Unload:
    """Drop all loaded models."""


Order = Generate | Cancel | Lend | Unload


@dataclass(frozen=True)
class Ready:
    """The worker takes orders; its first models are loaded."""

    limits: Limits
    device: str


@dataclass(frozen=True)
class Unusable:
    """The worker cannot do what it is for (no such device, a model that does not load), and ends."""

    sentence: str
    exit_code: int


@dataclass(frozen=True)
class Happened:
    """An event of a job, as the native API shows it."""

    id: str
    event: dict[str, Any]


@dataclass(frozen=True)
class PreviewImage:
    """A small image of the x0 prediction after a step, PNG."""

    id: str
    image: int
    step: int
    data: bytes


@dataclass(frozen=True)
class Partial:
    """A whole image decoded from the x0 prediction after a step, in the format of the job."""

    id: str
    image: int
    step: int
    data: bytes


@dataclass(frozen=True)
class ImageDone:
    """A finished image file, and what its metadata says."""

    id: str
    image: int
    data: bytes
    request: dict[str, Any]
    """As it was generated, JSON-ready."""
    parameters: str
    """A1111's text of it."""
    seconds: float


@dataclass(frozen=True)
class ImageFailed:
    """An image that there will not be, and why."""

    id: str
    image: int
    kind: FailureKind
    sentence: str


@dataclass(frozen=True)
class Ended:
    """A job has ended: each of its images is done or failed."""

    id: str


Report = Ready | Unusable | Happened | PreviewImage | Partial | ImageDone | ImageFailed | Ended
