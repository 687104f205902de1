"""What `sdcli encode` is to do: settings, the images that are encoded together, and results. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import SdcliError, UsageError
from sdcli.generation.vae_output import OF_ONE_FILE, Status
from sdcli.images.formats import Fit
from sdcli.images.image_files import upright_size
from sdcli.request.input_files import InputFile
from sdcli.vae.latent_record import Source

PACK = 16
"""Images in a packed file, if no batch size is given."""
MAX_PACK = 256
"""Images in a packed file that was named with -o: they are all held until it is written."""


@dataclass(frozen=True)
class EncodeSettings:
    """How images become latents, and where these go."""

    outdir: Path = Path("latents")
    output: Path | None = None
    """The one file for everything, instead of a folder."""
    pack: bool = False
    """One file per batch instead of one per image."""
    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    sample_seed: int | None = None
    """Draw from the VAE's distribution; None takes its mean."""
    half: bool = False
    batch_size: int | None = None
    check: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class EncodeResult:
    """The end of one image; `path` is whole on the disk when this is yielded."""

    status: Status
    source: Path
    path: Path | None = None
    facts: Source | None = None
    psnr: float | None = None
    """Decibels between the fitted image and its round trip, infinite where they are equal; only when checked."""
    notes: tuple[str, ...] = ()
    error: SdcliError | None = None


@dataclass(frozen=True)
class EncodeUnit:
    """Images that are encoded together, and with --pack the number of their file, from 1."""

    files: tuple[InputFile, ...]
    pack: int = 0


def encode_units(files: Iterable[InputFile], settings: EncodeSettings, *, cell: int) -> Iterator[EncodeUnit]:
    """Neighbours of equal size together, as many as a batch or a packed file holds; `cell` is that of the VAE.

    Only neighbours, since waiting for more of each size would remember ever more images. They follow from the images'
    headers, and from neither what is finished nor what can be decoded: a run that continues or is divided has the units
    of one that ran through. An image that is unreadable by its header is a unit of its own. Raises UsageError where one
    file would hold too many.
    """
    one_file = settings.pack and settings.output is not None
    limit = MAX_PACK if one_file else settings.batch_size or (PACK if settings.pack else 1)
    unit: list[InputFile] = []
    size, number = None, 1
    for file in files:
        own = _size_of(file.path, settings, cell) if limit > 1 or settings.pack else (0, 0)
        if own is None:
            yield EncodeUnit((file,))
            continue
        if unit and one_file and len(unit) == limit:
            raise UsageError(f"one file holds at most {MAX_PACK} images; without -o, --pack writes several files")
        if unit and not one_file and own != size:
            yield EncodeUnit(tuple(unit), number)
            unit, number = [], number + 1
        unit.append(file)
        size = own
        if len(unit) == limit and not one_file:
            yield EncodeUnit(tuple(unit), number)
            unit, number = [], number + 1
    if unit:
        yield EncodeUnit(tuple(unit), number)


def _size_of(path: Path, settings: EncodeSettings, cell: int) -> tuple[int, int] | None:
    """Width and height of an image as it is encoded, by its header; None where it cannot be."""
    try:
        width, height = upright_size(path)
    except OF_ONE_FILE:
        return None
    size = settings.size or (width // cell * cell, height // cell * cell)
    return size if all(size) else None
