"""The stream behind `sdcli encode`: images -> latent files, one batch at a time, with a VAE that is at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdcli.errors import BadImage, BadLatents, BadOutput, NotFound, Stop, UsageError, stop_if_asked
from sdcli.generation.encode_plan import EncodeResult, EncodeSettings, EncodeUnit, encode_units
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.run_shard import WHOLE, RunShard
from sdcli.generation.vae_output import OF_ONE_FILE, file_name, swept
from sdcli.images.image_files import open_image
from sdcli.images.metrics import distance
from sdcli.images.pixels import fit, to_pixels
from sdcli.io.files import AlreadyExists, write_whole
from sdcli.request.input_files import InputFile, input_digest
from sdcli.vae.latent_files import latent_bytes, read_latents, read_record
from sdcli.vae.latent_record import LatentRecord, Source


def check_encoding(vae: LoadedVae, settings: EncodeSettings) -> None:
    """Raise UsageError for settings that the VAE cannot honour."""
    if settings.sample_seed is not None and not vae.has_distribution:
        raise UsageError(f"the VAE of {vae.spec.name} has no distribution to draw from; leave --sample out")
    if settings.size is not None and any(side % vae.cell for side in settings.size):
        raise UsageError(f"--size takes multiples of {vae.cell} with the VAE of {vae.spec.name}")


def encode_files(
    files: Iterable[InputFile],
    vae: LoadedVae,
    settings: EncodeSettings,
    *,
    shard: RunShard = WHOLE,
    stop: Stop = lambda: None,
) -> Iterator[EncodeResult]:
    """Encode images and write latent files, holding one batch of them at a time; of a shard, its part of the batches.

    A file that an earlier run wrote from the same bytes with the same VAE and settings is skipped.
    Raises what `stop` answers, and CannotWrite for what concerns every image.
    """
    check_encoding(vae, settings)
    inputs = swept(files, settings.outdir, settings.output)
    for unit in shard.part(encode_units(inputs, settings, cell=vae.cell)):
        stop_if_asked(stop)
        yield from encode_unit(unit, vae, settings)
    stop_if_asked(stop)


def encode_unit(unit: EncodeUnit, vae: LoadedVae, settings: EncodeSettings) -> Iterator[EncodeResult]:
    """Encode the images of a unit that are not finished, and write them; yields one result for each of its images."""
    prepared = [_prepared(file, vae, settings) for file in unit.files]
    yield from (item for item in prepared if isinstance(item, EncodeResult))
    wanted = [item for item in prepared if isinstance(item, _Fitted)]
    if not wanted:
        return
    if settings.pack:
        yield from _packed(unit, wanted, vae, settings)
        return
    batches: dict[tuple[int, int], list[_Fitted]] = {}
    for file, item in zip(unit.files, prepared, strict=True):
        one = _mate(file, item, vae, settings) if isinstance(item, EncodeResult) else item
        if one is not None:  # of one size, unless a file has changed since its header was read
            batches.setdefault(one.image.size, []).append(one)
    for batch in batches.values():
        if any(one.wanted for one in batch):
            yield from _write_each(batch, vae, settings)


def _packed(
    unit: EncodeUnit, fitted: list[_Fitted], vae: LoadedVae, settings: EncodeSettings
) -> Iterator[EncodeResult]:
    size, same = fitted[0].image.size, []
    for item in fitted:
        if unit.pack and item.image.size == size:
            same.append(item)
            continue
        problem = (
            f"{item.source} is {_shown(item.image.size)} pixels, the others in this file {_shown(size)}; "
            "--size makes them equal"
            if unit.pack
            else f"{item.source} was changed during the run"
        )
        yield EncodeResult("failed", item.source, error=BadImage(problem))
    if same:
        path = settings.output or settings.outdir / f"pack-{unit.pack:05}.safetensors"
        yield from _write_pack(same, path, vae, settings)


@dataclass(frozen=True)
class _Fitted:
    """An image as the VAE will see it; `path` is where its latents go, unless they are packed."""

    source: Path
    path: Path | None
    image: Image.Image
    facts: Source
    wanted: bool = True
    """Whether its latents are to be written; others are encoded along, so that the batch is that of an earlier run."""


def _mate(file: InputFile, result: EncodeResult, vae: LoadedVae, settings: EncodeSettings) -> _Fitted | None:
    """A finished image of a batch, to be encoded along with the others; None for one that failed."""
    if result.status != "skipped" or result.facts is None:
        return None
    try:
        image = _fitted(file.path, open_image(file.path), vae, settings)
    except OF_ONE_FILE:
        return None
    return _Fitted(file.path, result.path, image, result.facts, wanted=False)


def _prepared(file: InputFile, vae: LoadedVae, settings: EncodeSettings) -> _Fitted | EncodeResult:
    """One image, fitted; or what became of it already: skipped or failed."""
    path = None if settings.pack else settings.output or settings.outdir / file_name(file.name, ".safetensors")
    try:
        digest = input_digest(str(file.path))
        if path is not None and os.path.lexists(path):
            record = _matching(path, [digest], vae, settings)
            if record is not None:
                return _skipped(file.path, path, 0, record, vae, settings)
            if not settings.overwrite:
                raise AlreadyExists(
                    f"{path} exists already, made of another image than {file.path} or with other settings; "
                    "--overwrite replaces it"
                )
        image = open_image(file.path)
        fitted = _fitted(file.path, image, vae, settings)
    except OF_ONE_FILE as error:
        return EncodeResult("failed", file.path, path, error=error)
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


def _fitted(path: Path, image: Image.Image, vae: LoadedVae, settings: EncodeSettings) -> Image.Image:
    try:
        return fit(image, settings.size, how=settings.fit, cell=vae.cell)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None


def _write_each(batch: list[_Fitted], vae: LoadedVae, settings: EncodeSettings) -> Iterator[EncodeResult]:
    try:
        latents, notes = _encode(batch, vae, settings)
    except OF_ONE_FILE as error:
        yield from (EncodeResult("failed", item.source, item.path, error=error) for item in batch if item.wanted)
        return
    for item, row in zip(batch, latents, strict=True):
        if not item.wanted:
            continue
        assert item.path is not None
        facts = item.facts.model_copy(update={"fallbacks": notes})
        try:
            _check_finite(row)
            data = latent_bytes(row[None], _record([facts], vae, settings))
            write_whole(item.path, data, overwrite=settings.overwrite)
            psnr = _psnr_of(item.image, row, vae) if settings.check else None
        except OF_ONE_FILE as error:
            record = _matching(item.path, [item.facts.sha256], vae, settings)
            if isinstance(error, AlreadyExists) and record is not None:  # by another process, a moment ago
                yield _skipped(item.source, item.path, 0, record, vae, settings)
            else:
                yield EncodeResult("failed", item.source, item.path, error=error)
            continue
        yield EncodeResult("done", item.source, item.path, facts, psnr, notes)


def _write_pack(batch: list[_Fitted], path: Path, vae: LoadedVae, settings: EncodeSettings) -> Iterator[EncodeResult]:
    """All of a batch in one file, or, where anything is wrong, none of it."""
    try:
        if os.path.lexists(path):
            record = _matching(path, [item.facts.sha256 for item in batch], vae, settings)
            if record is not None:
                yield from (_skipped(item.source, path, k, record, vae, settings) for k, item in enumerate(batch))
                return
            if not settings.overwrite:
                raise AlreadyExists(
                    f"{path} exists already, and holds other images or settings; --overwrite replaces it"
                )
        latents, notes = _encode(batch, vae, settings)
        _check_finite(latents)
        facts = [item.facts.model_copy(update={"fallbacks": notes}) for item in batch]
        write_whole(path, latent_bytes(latents, _record(facts, vae, settings)), overwrite=settings.overwrite)
    except OF_ONE_FILE as error:
        yield from (EncodeResult("failed", item.source, path, error=error) for item in batch)
        return
    for item, its_facts, row in zip(batch, facts, latents, strict=True):
        try:
            psnr = _psnr_of(item.image, row, vae) if settings.check else None
        except OF_ONE_FILE as error:
            yield EncodeResult("failed", item.source, path, error=error)
            continue
        yield EncodeResult("done", item.source, path, its_facts, psnr, notes)


def _encode(batch: list[_Fitted], vae: LoadedVae, settings: EncodeSettings) -> tuple[Tensor, tuple[str, ...]]:
    """Latents [B, C, h, w] as they are stored, computed `batch_size` at a time."""
    at_once = settings.batch_size or 1
    latents, notes = [], dict[str, None]()
    for start in range(0, len(batch), at_once):
        some = batch[start : start + at_once]
        seed = settings.sample_seed
        seeds = None if seed is None else [seed_of(seed, item.facts.sha256) for item in some]
        rows, more = vae.encode([to_pixels(item.image) for item in some], seeds=seeds)
        latents.append(rows.half() if settings.half else rows)
        notes |= dict.fromkeys(more)
    return torch.cat(latents), tuple(notes)


def seed_of(seed: int, sha256: str) -> int:
    """The seed of one image's sample: of the run's seed and the image's bytes, not of its place in the folder."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sha256}".encode()).digest()[:7])


def _psnr_of(image: Image.Image, stored: Tensor, vae: LoadedVae) -> float:
    decoded, _ = vae.decode(stored.float())
    apart = distance(image, decoded)
    assert apart is not None, "they are of one size: the image was cut to whole cells"
    return apart.psnr


def _record(facts: list[Source], vae: LoadedVae, settings: EncodeSettings) -> LatentRecord:
    return LatentRecord(
        model=vae.spec.name,
        vae=vae.identity,
        scaling_factor=vae.scaling_factor,
        sample="mean" if settings.sample_seed is None else "sample",
        seed=settings.sample_seed,
        size=settings.size,
        dtype=vae.dtype,
        stored="float16" if settings.half else "float32",
        source=tuple(facts),
    )


def _matching(path: Path, digests: list[str], vae: LoadedVae, settings: EncodeSettings) -> LatentRecord | None:
    """The record of an existing file, if encoding now would give the same latents."""
    try:
        record = read_record(path)
    except (BadLatents, NotFound):
        return None
    if record is None or [source.sha256 for source in record.source] != digests:
        return None
    now = _record([source.model_copy(update={"fit": settings.fit}) for source in record.source], vae, settings)
    return record if record == now.model_copy(update={"model": record.model}) else None


def _skipped(
    source: Path, path: Path, index: int, record: LatentRecord, vae: LoadedVae, settings: EncodeSettings
) -> EncodeResult:
    decibels = None
    if settings.check:
        image = _fitted(source, open_image(source), vae, settings)
        decibels = _psnr_of(image, read_latents(path).latents[index], vae)
    return EncodeResult("skipped", source, path, record.source[index], decibels)


def _check_finite(latents: Tensor) -> None:
    if not latents.isfinite().all():
        other = "without --half" if latents.dtype == torch.float16 else "with --dtype float32"
        raise BadOutput(f"the latents are not finite (NaN or too large); try {other}")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
