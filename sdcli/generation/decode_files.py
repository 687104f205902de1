"""The stream behind `sdcli decode`: latent files -> images, one file at a time, with the VAE that each file names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from sdcli.errors import BadLatents, SdcliError, Stop, UsageError, stop_if_asked
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.vae_output import OF_ONE_FILE, Status, file_name, swept
from sdcli.images.formats import MAX_PIXELS, MAX_SIDE, SUFFIX_OF, ImageFormat
from sdcli.io.files import check_new, write_whole
from sdcli.metadata.embed import image_bytes
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.input_files import InputFile, Names
from sdcli.vae.latent_files import LatentFile, read_latents


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


def decode_files(
    files: Iterable[InputFile],
    registry: Registry,
    cache: ModelCache,
    settings: DecodeSettings,
    *,
    model: str | None = None,
    stop: Stop = lambda: None,
) -> Iterator[DecodeResult]:
    """Decode latent files and write an image for each latent in them, holding one file at a time.

    Without a `model`, that of the file's record is taken where the registry knows it, else the default one.
    Raises what `stop` answers, what loading a model raises, and CannotWrite for what concerns every image.
    """
    names = Names()
    for file in swept(files, settings.outdir, settings.output):
        stop_if_asked(stop)
        try:
            content = read_latents(file.path, scaled=settings.scaled)
        except OF_ONE_FILE as error:
            yield DecodeResult("failed", file.path, error=error)
            continue
        spec, notes = _model_of(file.path, content, registry, model)
        with cache.lease_vae(spec) as vae:
            try:
                _check_fits(file.path, content.latents, vae, settings)
            except OF_ONE_FILE as error:
                yield DecodeResult("failed", file.path, error=error)
                continue
            if content.record is not None and content.record.vae != vae.identity:
                notes += (
                    f"{file.path} was made with another VAE ({_short(content.record.vae)}) than that of {spec.name} "
                    f"({_short(vae.identity)}); the colours may be off",
                )
            for index, latents in enumerate(content.unscaled(vae.scaling_factor, vae.shift_factor)):
                stop_if_asked(stop)
                suffix = f"-{index + 1}" if len(content.latents) > 1 else ""
                name = names.claim(file.name.with_name(file.name.name + suffix))
                yield _decoded(file.path, index, latents, name, vae, settings, notes if index == 0 else ())


def _decoded(
    source: Path,
    index: int,
    latents: Tensor,
    name: PurePosixPath,
    vae: LoadedVae,
    settings: DecodeSettings,
    notes: tuple[str, ...],
) -> DecodeResult:
    path = settings.output or settings.outdir / file_name(name, SUFFIX_OF[settings.format])
    try:
        check_new(path, overwrite=settings.overwrite)
        image, more = vae.decode(latents, tiled=settings.tiled)
        write_whole(path, image_bytes(image, settings.format, None), overwrite=settings.overwrite)
    except OF_ONE_FILE as error:
        return DecodeResult("failed", source, index, path, notes=notes, error=error)
    return DecodeResult(
        "done", source, index, path, width=image.width, height=image.height, model=vae.spec.name, notes=notes + more
    )


def _model_of(
    path: Path, content: LatentFile, registry: Registry, model: str | None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Only names of the registry are taken from a file: a path in it could name anything."""
    if model is not None or content.record is None:
        return registry.find(model), ()
    if content.record.model in registry.models:
        return registry.find(content.record.model), ()
    note = f"{path} was made with {content.record.model!r}, which models.yaml does not know; decoding with the default"
    return registry.find(None), (note,)


def _check_fits(path: Path, latents: Tensor, vae: LoadedVae, settings: DecodeSettings) -> None:
    count, channels, height, width = latents.shape
    wanted = vae.channels
    if channels != wanted:
        raise BadLatents(
            f"{path} has latents of {channels} channels; the VAE of {vae.spec.name} takes {wanted} "
            "(-m names another model)"
        )
    height, width = height * vae.cell, width * vae.cell
    if height * width > MAX_PIXELS:
        raise BadLatents(f"{path} would be an image of more than {MAX_PIXELS:,} pixels")
    if max(height, width) > MAX_SIDE[settings.format]:
        raise UsageError(f"{path} would be {width}x{height} pixels, too long for {settings.format}; use png")
    if count > 1 and settings.output is not None:
        raise UsageError(f"{path} holds {count} images; -o names a single one, --outdir a folder")


def _short(identity: str) -> str:
    return identity[:19]
