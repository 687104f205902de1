"""What `sdcli decode` is to do: settings, the names of all images, and results. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdcli.errors import SdcliError
from sdcli.generation.vae_output import OF_ONE_FILE, Status
from sdcli.images.formats import ImageFormat
from sdcli.request.input_files import InputFile, Names
from sdcli.vae.latent_headers import count_of


@dataclass(frozen=True)
class DecodeSettings:
    """How latents become images, and where these go."""

    outdir: Path = Path("outputs")
    output: Path | None = None
    format: ImageFormat = "png"
    scaled: bool | None = None
    """Whether the latents in plain files, which do not record it, are scaled."""
    tiled: bool = False
    overwrite: bool = False
    resume: bool = False
    """Skip images that the journal knows as finished, and take those with the same bytes as such."""


@dataclass(frozen=True)
class DecodeResult:
    """The end of one latent [C, h, w], or of a whole file that could not be read (then `index` is None)."""

    status: Status
    source: Path
    index: int | None = None
    path: Path | None = None
    width: int = 0
    height: int = 0
    model: str = ""
    notes: tuple[str, ...] = ()
    error: SdcliError | None = None


@dataclass(frozen=True)
class DecodeUnit:
    """A latent file, and the names of its images; none where its header cannot be read."""

    file: InputFile
    names: tuple[PurePosixPath, ...] = ()


def decode_units(files: Iterable[InputFile]) -> Iterator[DecodeUnit]:
    """The files with the names of their images, which follow from the files' headers and no two images share."""
    names = Names()
    for file in files:
        try:
            count = count_of(file.path)
        except OF_ONE_FILE:
            yield DecodeUnit(file)
            continue
        suffixes = [f"-{index + 1}" for index in range(count)] if count > 1 else [""]
        own = [names.claim(file.name.with_name(file.name.name + suffix)) for suffix in suffixes]
        yield DecodeUnit(file, tuple(own))
