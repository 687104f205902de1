"""The stream behind `sdcli decode`: latent files -> images, one file at a time, with the VAE that each file names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcli.errors import BadLatents, Stop, UsageError, stop_if_asked
from sdcli.generation.decode_plan import DecodeResult, DecodeSettings, DecodeUnit, decode_units
from sdcli.generation.journal import Journal
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.run_shard import WHOLE, RunShard
from sdcli.generation.vae_output import OF_ONE_FILE, file_name, swept
from sdcli.images.formats import MAX_PIXELS, MAX_SIDE, SUFFIX_OF
from sdcli.io.files import AlreadyExists, check_new, write_whole
from sdcli.metadata.embed import image_bytes
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.input_files import InputFile, input_digest
from sdcli.vae.latent_files import LatentFile, read_latents


def decode_files(
    files: Iterable[InputFile],
    registry: Registry,
    cache: ModelCache,
    settings: DecodeSettings,
    *,
    model: str | None = None,
    journal: Journal | None = None,
    shard: RunShard = WHOLE,
    stop: Stop = lambda: None,
) -> Iterator[DecodeResult]:
    """Decode latent files and write an image for each latent in them, holding one file at a time; of a shard, its part.

    Without a `model`, that of the file's record is taken where the registry knows it, else the default one. A
    `journal`, which resuming needs, gets an entry for each image.
    Raises what `stop` answers, what loading a model raises, and CannotWrite for what concerns every image.
    """
    inputs = swept(files, settings.outdir, settings.output)
    for unit in shard.part(decode_units(inputs)):
        stop_if_asked(stop)
        yield from decode_unit(unit, registry, cache, settings, model=model, journal=journal, stop=stop)
    stop_if_asked(stop)


def decode_unit(
    unit: DecodeUnit,
    registry: Registry,
    cache: ModelCache,
    settings: DecodeSettings,
    *,
    model: str | None = None,
    journal: Journal | None = None,
    stop: Stop = lambda: None,
) -> Iterator[DecodeResult]:
    """Decode the latents of one file; see `decode_files`."""
    path = unit.file.path
    try:
        content = read_latents(path, scaled=settings.scaled)
        if len(content.latents) != len(unit.names):
            raise BadLatents(f"{path} was changed during the run")
    except OF_ONE_FILE as error:
        yield DecodeResult("failed", path, error=error)
        return
    spec, notes = _model_of(path, content, registry, model)
    with cache.lease_vae(spec) as vae:
        try:
            _check_fits(path, content.latents, vae, settings)
        except OF_ONE_FILE as error:
            yield DecodeResult("failed", path, error=error)
            return
        if content.record is not None and content.record.vae != vae.identity:
            notes += (
                f"{path} was made with another VAE ({_short(content.record.vae)}) than that of {spec.name} "
                f"({_short(vae.identity)}); the colours may be off",
            )
        digest = None if journal is None else input_digest(str(path))
        latents = content.unscaled(vae.scaling_factor, vae.shift_factor)
        for index, (one, name) in enumerate(zip(latents, unit.names, strict=True)):
            stop_if_asked(stop)
            target = settings.output or settings.outdir / file_name(name, SUFFIX_OF[settings.format])
            part = _Part(path, index, one, target, notes if index == 0 else ())
            entry = None if journal is None else _DecodeEntry(journal, f"{digest} {index}")
            yield _decoded(part, vae, settings, entry)


@dataclass(frozen=True)
class _Part:
    """One latent [C, h, w] of a file, and where its image goes."""

    source: Path
    index: int
    latents: Tensor
    path: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _DecodeEntry:
    """The journal of a run that can be resumed, and which latent of which file an entry is about."""

    journal: Journal
    source: str

    def finished(self, path: Path, key: str, vae: LoadedVae) -> bool:
        """Whether an earlier run wrote the image."""
        name = partial(self._name, path)
        return self.journal.finished(self._key(key), lambda: vae.identity, taken=set(), name=name) is not None

    def note(self, path: Path, key: str, vae: LoadedVae, data: bytes) -> None:
        """Record that an image is about to appear."""
        self.journal.note(self._key(key), vae.identity, self._name(path), data)

    def _key(self, settings: str) -> str:
        return hashlib.sha256(f"decode 1 {self.source} {settings}".encode()).hexdigest()

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.journal.folder)


def _decoded(part: _Part, vae: LoadedVae, settings: DecodeSettings, recorded: _DecodeEntry | None) -> DecodeResult:
    path, (_, height, width) = part.path, part.latents.shape
    shown: dict[str, Any] = {"width": width * vae.cell, "height": height * vae.cell, "model": vae.spec.name}
    key = f"{settings.format} {settings.scaled} {settings.tiled} {vae.dtype} {vae.scaling_factor}"
    try:
        if not settings.resume:
            check_new(path, overwrite=settings.overwrite)
        elif recorded is not None and recorded.finished(path, key, vae):
            return DecodeResult("skipped", part.source, part.index, path, **shown)
        image, more = vae.decode(part.latents, tiled=settings.tiled)
        data = image_bytes(image, settings.format, None)
        if settings.resume and _holds(path, data):
            return DecodeResult("skipped", part.source, part.index, path, **shown)
        check_new(path, overwrite=settings.overwrite)
        if recorded is not None:
            recorded.note(path, key, vae, data)
        try:
            write_whole(path, data, overwrite=settings.overwrite)
        except AlreadyExists:
            if not (settings.resume and _holds(path, data)):  # else by another process, a moment ago
                raise
    except OF_ONE_FILE as error:
        return DecodeResult("failed", part.source, part.index, path, notes=part.notes, error=error)
    return DecodeResult("done", part.source, part.index, path, notes=part.notes + more, **shown)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file has exactly these bytes: the image, written by a process that could not report it."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


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
