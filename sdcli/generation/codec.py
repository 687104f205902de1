"""Images -> latent files, and back: the two streams behind `sdcli encode` and `sdcli decode`, a file at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.errors import (
    BadImage,
    BadLatents,
    BadOutput,
    NotFound,
    OutOfMemory,
    SdcliError,
    Stop,
    UsageError,
    stop_if_asked,
)
from sdcli.generation.settings import RunSettings
from sdcli.images.formats import MAX_PIXELS, MAX_SIDE, SUFFIX_OF, ImageFormat
from sdcli.images.image_files import open_image
from sdcli.images.metrics import distance
from sdcli.images.pixels import Fit, fit, from_pixels, to_pixels
from sdcli.io.files import AlreadyExists, check_folder, check_new, write_whole
from sdcli.io.temporary_files import sweep
from sdcli.metadata.embed import image_bytes
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.input_files import InputFile, Names, input_digest
from sdcli.vae import autoencoder
from sdcli.vae.latent_files import LatentFile, LatentRecord, Source, latent_bytes, read_latents, read_record
from sdcli.vae.latent_space import decode_with_fallbacks

PACK = 16
"""Images in a packed file, where no batch size says otherwise."""
MAX_PACK = 256
"""Images in a packed file that was named with -o: they are all held until it is written."""
MAX_NAME_BYTES = 255
"""What file systems take as a name; an image may have one so long that no longer suffix fits behind it."""

_OF_ONE_ITEM = (BadImage, BadLatents, BadOutput, NotFound, OutOfMemory, UsageError, AlreadyExists)
"""Failures that concern one file; the rest of the batch goes on."""

Status = Literal["done", "skipped", "failed"]


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
class Encoded:
    """What became of one image; `path` is whole on the disk when this is yielded."""

    status: Status
    source: Path
    path: Path | None = None
    facts: Source | None = None
    psnr: float | None = None
    """Decibels between the fitted image and its round trip, infinite where they are equal; only when checked."""
    notes: tuple[str, ...] = ()
    error: SdcliError | None = None


@dataclass(frozen=True)
class DecodeSettings:
    """How latents become images, and where these go."""

    outdir: Path = Path("outputs")
    output: Path | None = None
    format: ImageFormat = "png"
    scaled: bool | None = None
    """What plain files hold, which do not say it themselves."""
    tiled: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Decoded:
    """What became of one latent [C, h, w], or of a whole file that could not be read (then `index` is None)."""

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
class Codec:
    """A model's VAE at work on its own, unscaled latents: files hold these, exactly as they are."""

    pipeline: Pipeline
    scaling_factor: float
    shift_factor: float

    @classmethod
    def load(cls, spec: ModelSpec, run: RunSettings) -> Codec:
        """Load the VAE of a model; `auto` computes in float32, since what is encoded should survive the round trip."""
        dtype = "float32" if run.dtype == "auto" else run.dtype
        model = load_model(spec, device=run.device, dtype=dtype, offline=run.offline, parts=("vae",))
        factor, shift = autoencoder.scaling_factor(model.vae), autoencoder.shift_factor(model.vae)
        # nothing is multiplied, so nothing is rounded
        model.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        return cls(Pipeline.of(model), factor, shift)

    @property
    def spec(self) -> ModelSpec:
        return self.pipeline.model.spec

    @property
    def dtype(self) -> str:
        """What the VAE computes in."""
        return str(self.pipeline.model.dtype).removeprefix("torch.")

    @property
    def cell(self) -> int:
        """Pixels a side that become one cell of the latents."""
        return autoencoder.cell(self.pipeline.model.vae)

    @cached_property
    def vae_identity(self) -> str:
        """Which weights the VAE has; see `LoadedModel.identity`."""
        return self.pipeline.model.identity("vae")

    def encode(self, pixels: Sequence[Tensor], *, seeds: Sequence[int] | None) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels [3, H, W] of equal size -> unscaled latents [B, C, H/cell, W/cell], float32, and what that took.

        The mean, or a sample with one seed per image. Raises OutOfMemory.
        """
        vae = self.pipeline.model.vae
        moments, notes = autoencoder.moments_with_fallbacks(vae, pixels)
        return autoencoder.drawn(vae, moments, None if seeds is None else autoencoder.generators_for(seeds)), notes

    def decode(self, latents: Tensor, *, tiled: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
        """Unscaled latents [C, h, w] -> an image, and what had to be done for it. Raises OutOfMemory and BadOutput."""
        on_device = latents.to(self.pipeline.model.device)
        pixels, notes = decode_with_fallbacks(self.pipeline.space, on_device, tiled=tiled, may_be_black=True)
        return from_pixels(pixels), notes


# Images -> latents


def encode_all(
    files: Iterable[InputFile], codec: Codec, settings: EncodeSettings, *, stop: Stop = lambda: None
) -> Iterator[Encoded]:
    """Encode images and write latent files, holding one batch of them at a time.

    A file that an earlier run wrote from the same bytes with the same VAE and settings is skipped.
    Raises what `stop` answers, and CannotWrite for what concerns every image.
    """
    if settings.sample_seed is not None and not autoencoder.has_distribution(codec.pipeline.model.vae):
        raise UsageError(f"the VAE of {codec.spec.name} has no distribution to draw from; leave --sample out")
    if settings.size is not None and any(side % codec.cell for side in settings.size):
        raise UsageError(f"--size takes multiples of {codec.cell} with the VAE of {codec.spec.name}")
    batches = _batches((_prepared(file, codec, settings) for file in _swept(files, settings)), settings)
    number = 0
    for batch in batches:
        stop_if_asked(stop)
        if isinstance(batch, Encoded):
            yield batch
        elif settings.pack:
            number += 1
            yield from _write_pack(
                batch, settings.output or settings.outdir / f"pack-{number:05}.safetensors", codec, settings
            )
        else:
            yield from _write_each(batch, codec, settings)
    stop_if_asked(stop)


@dataclass(frozen=True)
class _Fitted:
    """An image as the VAE will see it; `path` is where its latents go, unless they are packed."""

    source: Path
    path: Path | None
    image: Image.Image
    facts: Source


def _prepared(file: InputFile, codec: Codec, settings: EncodeSettings) -> _Fitted | Encoded:
    """One image, fitted; or what became of it already: skipped or failed."""
    path = None if settings.pack else settings.output or settings.outdir / _file_name(file.name, ".safetensors")
    try:
        digest = input_digest(str(file.path))
        if path is not None and os.path.lexists(path):
            record = _matching(path, [digest], codec, settings)
            if record is not None:
                return _skipped(file.path, path, 0, record, codec, settings)
            if not settings.overwrite:
                raise AlreadyExists(
                    f"{path} exists already, made of another image than {file.path} or with other settings; "
                    "--overwrite replaces it"
                )
        image = open_image(file.path)
        fitted = _fitted(file.path, image, codec, settings)
    except _OF_ONE_ITEM as error:
        return Encoded("failed", file.path, path, error=error)
    facts = Source(
        name=os.fsencode(file.path.name).decode(errors="replace"),
        sha256=digest,
        width=image.width,
        height=image.height,
        fitted_width=fitted.width,
        fitted_height=fitted.height,
        fit=settings.fit,
    )
    return _Fitted(file.path, path, fitted, facts)


def _fitted(path: Path, image: Image.Image, codec: Codec, settings: EncodeSettings) -> Image.Image:
    try:
        return fit(image, settings.size, how=settings.fit, cell=codec.cell)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def _batches(prepared: Iterable[_Fitted | Encoded], settings: EncodeSettings) -> Iterator[list[_Fitted] | Encoded]:
    """Neighbours of equal size together, as many as a batch or a packed file holds.

    Only neighbours, since waiting for more of each size would hold ever more images in memory.
    """
    one_file = settings.pack and settings.output is not None
    limit = MAX_PACK if one_file else settings.batch_size or (PACK if settings.pack else 1)
    batch: list[_Fitted] = []
    for item in prepared:
        if isinstance(item, Encoded):
            yield item
            continue
        if batch and one_file and len(batch) == limit:
            raise UsageError(f"one file holds at most {MAX_PACK} images; without -o, --pack writes several files")
        if batch and item.image.size != batch[0].image.size and one_file:
            theirs, ours = _shown(item.image.size), _shown(batch[0].image.size)
            problem = f"{item.source} is {theirs} pixels, the others in this file {ours}; --size makes them equal"
            yield Encoded("failed", item.source, error=BadImage(problem))
            continue
        if batch and (item.image.size != batch[0].image.size or len(batch) == limit):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == limit and not one_file:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_each(batch: list[_Fitted], codec: Codec, settings: EncodeSettings) -> Iterator[Encoded]:
    try:
        latents, notes = _encode(batch, codec, settings)
    except _OF_ONE_ITEM as error:
        yield from (Encoded("failed", item.source, item.path, error=error) for item in batch)
        return
    for item, row in zip(batch, latents, strict=True):
        assert item.path is not None
        facts = item.facts.model_copy(update={"fallbacks": notes})
        try:
            _check_finite(row)
            data = latent_bytes(row[None], _record([facts], codec, settings))
            write_whole(item.path, data, overwrite=settings.overwrite)
            psnr = _psnr_of(item.image, row, codec) if settings.check else None
        except _OF_ONE_ITEM as error:
            yield Encoded("failed", item.source, item.path, error=error)
            continue
        yield Encoded("done", item.source, item.path, facts, psnr, notes)


def _write_pack(batch: list[_Fitted], path: Path, codec: Codec, settings: EncodeSettings) -> Iterator[Encoded]:
    """All of a batch in one file, or, where anything is wrong, none of it."""
    try:
        if os.path.lexists(path):
            record = _matching(path, [item.facts.sha256 for item in batch], codec, settings)
            if record is not None:
                yield from (_skipped(item.source, path, k, record, codec, settings) for k, item in enumerate(batch))
                return
            if not settings.overwrite:
                raise AlreadyExists(
                    f"{path} exists already, and holds other images or settings; --overwrite replaces it"
                )
        latents, notes = _encode(batch, codec, settings)
        _check_finite(latents)
        facts = [item.facts.model_copy(update={"fallbacks": notes}) for item in batch]
        write_whole(path, latent_bytes(latents, _record(facts, codec, settings)), overwrite=settings.overwrite)
    except _OF_ONE_ITEM as error:
        yield from (Encoded("failed", item.source, path, error=error) for item in batch)
        return
    for item, its_facts, row in zip(batch, facts, latents, strict=True):
        try:
            psnr = _psnr_of(item.image, row, codec) if settings.check else None
        except _OF_ONE_ITEM as error:
            yield Encoded("failed", item.source, path, error=error)
            continue
        yield Encoded("done", item.source, path, its_facts, psnr, notes)


def _encode(batch: list[_Fitted], codec: Codec, settings: EncodeSettings) -> tuple[Tensor, tuple[str, ...]]:
    """Latents [B, C, h, w] as they are stored, computed `batch_size` at a time."""
    at_once = settings.batch_size or 1
    latents, notes = [], dict[str, None]()
    for start in range(0, len(batch), at_once):
        some = batch[start : start + at_once]
        seed = settings.sample_seed
        seeds = None if seed is None else [seed_of(seed, item.facts.sha256) for item in some]
        rows, more = codec.encode([to_pixels(item.image) for item in some], seeds=seeds)
        latents.append(rows.half() if settings.half else rows)
        notes |= dict.fromkeys(more)
    return torch.cat(latents), tuple(notes)


def seed_of(seed: int, sha256: str) -> int:
    """The seed of one image's sample: of the run's seed and the image's bytes, not of its place in the folder."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sha256}".encode()).digest()[:7])


def _psnr_of(image: Image.Image, stored: Tensor, codec: Codec) -> float:
    decoded, _ = codec.decode(stored.float())
    apart = distance(image, decoded)
    assert apart is not None, "they are of one size: the image was cut to whole cells"
    return apart.psnr


def _record(facts: list[Source], codec: Codec, settings: EncodeSettings) -> LatentRecord:
    return LatentRecord(
        model=codec.spec.name,
        vae=codec.vae_identity,
        scaling_factor=codec.scaling_factor,
        sample="mean" if settings.sample_seed is None else "sample",
        seed=settings.sample_seed,
        size=settings.size,
        dtype=codec.dtype,
        stored="float16" if settings.half else "float32",
        source=tuple(facts),
    )


def _matching(path: Path, digests: list[str], codec: Codec, settings: EncodeSettings) -> LatentRecord | None:
    """The record of an existing file, if encoding now would give the same latents."""
    try:
        record = read_record(path)
    except (BadLatents, NotFound):
        return None
    if record is None or [source.sha256 for source in record.source] != digests:
        return None
    now = _record([source.model_copy(update={"fit": settings.fit}) for source in record.source], codec, settings)
    return record if record == now.model_copy(update={"model": record.model}) else None


def _skipped(
    source: Path, path: Path, index: int, record: LatentRecord, codec: Codec, settings: EncodeSettings
) -> Encoded:
    decibels = None
    if settings.check:
        image = _fitted(source, open_image(source), codec, settings)
        decibels = _psnr_of(image, read_latents(path).latents[index], codec)
    return Encoded("skipped", source, path, record.source[index], decibels)


def _check_finite(latents: Tensor) -> None:
    if not latents.isfinite().all():
        other = "without --half" if latents.dtype == torch.float16 else "with --dtype float32"
        raise BadOutput(f"the latents are not finite (NaN or too large); try {other}")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# Latents -> images


def decode_all(
    files: Iterable[InputFile],
    registry: Registry,
    run: RunSettings,
    settings: DecodeSettings,
    *,
    model: str | None = None,
    stop: Stop = lambda: None,
) -> Iterator[Decoded]:
    """Decode latent files and write an image for each latent in them, holding one file at a time.

    Without a `model`, that of the file's record is taken where the registry knows it, else the default one.
    Raises what `stop` answers, what loading a model raises, and CannotWrite for what concerns every image.
    """
    codec: Codec | None = None
    names = Names()
    for file in _swept(files, settings):
        stop_if_asked(stop)
        try:
            content = read_latents(file.path, scaled=settings.scaled)
        except _OF_ONE_ITEM as error:
            yield Decoded("failed", file.path, error=error)
            continue
        spec, notes = _model_of(file.path, content, registry, model)
        if codec is None or codec.spec != spec:
            codec = None  # before the next one is loaded: two do not fit everywhere
            codec = Codec.load(spec, run)
        try:
            _check_fits(file.path, content.latents, codec, settings)
        except _OF_ONE_ITEM as error:
            yield Decoded("failed", file.path, error=error)
            continue
        if content.record is not None and content.record.vae != codec.vae_identity:
            notes += (
                f"{file.path} was made with another VAE ({_short(content.record.vae)}) than that of {spec.name} "
                f"({_short(codec.vae_identity)}); the colours may be off",
            )
        for index, latents in enumerate(content.unscaled(codec.scaling_factor, codec.shift_factor)):
            stop_if_asked(stop)
            suffix = f"-{index + 1}" if len(content.latents) > 1 else ""
            name = names.claim(file.name.with_name(file.name.name + suffix))
            yield _decoded(file.path, index, latents, name, codec, settings, notes if index == 0 else ())


def _decoded(
    source: Path,
    index: int,
    latents: Tensor,
    name: PurePosixPath,
    codec: Codec,
    settings: DecodeSettings,
    notes: tuple[str, ...],
) -> Decoded:
    path = settings.output or settings.outdir / _file_name(name, SUFFIX_OF[settings.format])
    try:
        check_new(path, overwrite=settings.overwrite)
        image, more = codec.decode(latents, tiled=settings.tiled)
        write_whole(path, image_bytes(image, settings.format, None), overwrite=settings.overwrite)
    except _OF_ONE_ITEM as error:
        return Decoded("failed", source, index, path, notes=notes, error=error)
    return Decoded(
        "done", source, index, path, width=image.width, height=image.height, model=codec.spec.name, notes=notes + more
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


def _check_fits(path: Path, latents: Tensor, codec: Codec, settings: DecodeSettings) -> None:
    count, channels, height, width = latents.shape
    wanted = autoencoder.latent_channels(codec.pipeline.model.vae)
    if channels != wanted:
        raise BadLatents(
            f"{path} has latents of {channels} channels; the VAE of {codec.spec.name} takes {wanted} "
            "(-m names another model)"
        )
    height, width = height * codec.cell, width * codec.cell
    if height * width > MAX_PIXELS:
        raise BadLatents(f"{path} would be an image of more than {MAX_PIXELS:,} pixels")
    if max(height, width) > MAX_SIDE[settings.format]:
        raise UsageError(f"{path} would be {width}x{height} pixels, too long for {settings.format}; use png")
    if count > 1 and settings.output is not None:
        raise UsageError(f"{path} holds {count} images; -o names a single one, --outdir a folder")


def _short(identity: str) -> str:
    return identity[:19]


# Shared


def check_output(settings: EncodeSettings | DecodeSettings) -> None:
    """Raise CannotWrite now for what would fail after the model is loaded."""
    check_folder(settings.output.parent if settings.output is not None else settings.outdir)


def _file_name(name: PurePosixPath, suffix: str) -> PurePosixPath:
    """The name with its suffix; one too long is cut, and a digest of the whole tells it from its like."""
    whole = os.fsencode(name.name)
    if len(whole) + len(suffix) <= MAX_NAME_BYTES:
        return name.with_name(name.name + suffix)
    end = f"-{hashlib.sha256(whole).hexdigest()[:12]}{suffix}"
    return name.with_name(whole[: MAX_NAME_BYTES - len(end)].decode(errors="ignore") + end)


def _swept(files: Iterable[InputFile], settings: EncodeSettings | DecodeSettings) -> Iterator[InputFile]:
    """The same files; on the way the folders they lead to lose what killed runs left there."""
    seen: set[Path] = set()
    for file in files:
        folder = settings.output.parent if settings.output is not None else settings.outdir / file.name.parent
        if folder not in seen:
            seen.add(folder)
            with contextlib.suppress(OSError):
                sweep(folder)
        yield file
