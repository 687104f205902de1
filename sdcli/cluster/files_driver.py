"""`encode` and `decode` on a cluster, the driver's side: files become units, rows become results. Imports no torch.

The units are those of one process, made from the headers of the files, so that what is encoded together does not depend
on who does it. Workers write the files themselves; a file that an earlier attempt wrote is recognised by its content.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdcli.cluster.ray_engine import ClusterSettings
from sdcli.cluster.results import results_on_cluster
from sdcli.cluster.run import ClusterEngine
from sdcli.cluster.units import ItemDone, Program, Throughput, Trouble, Unit, UnitFailed
from sdcli.errors import SdcliError, Stop, unpacked_error
from sdcli.generation.decode_plan import DecodeResult, DecodeSettings, DecodeUnit, decode_units
from sdcli.generation.encode_plan import EncodeResult, EncodeSettings, EncodeUnit, encode_units
from sdcli.generation.journal import Journal
from sdcli.generation.settings import RunSettings
from sdcli.generation.vae_output import swept
from sdcli.models.registry import ModelSpec, Registry
from sdcli.request.input_files import InputFile
from sdcli.vae.latent_record import Source

ENCODE, DECODE = "sdcli.cluster.files_worker:start_encoding", "sdcli.cluster.files_worker:start_decoding"


@dataclass(frozen=True)
class EncodeSetup:
    """What the workers that encode need to know once."""

    spec: ModelSpec
    run: RunSettings
    settings: EncodeSettings
    began: float
    """When the run began, by the clock of the output folder's disk."""


@dataclass(frozen=True)
class DecodeSetup:
    """What the workers that decode need to know once."""

    registry: Registry
    model: str | None
    run: RunSettings
    settings: DecodeSettings
    part: str
    """The beginning of the names of this run's parts of the journal."""
    began: float
    """When the run began, by the clock of the output folder's disk."""


def encode(
    files: Iterable[InputFile],
    spec: ModelSpec,
    run: RunSettings,
    settings: EncodeSettings,
    cluster: ClusterSettings,
    *,
    stop: Stop,
) -> Iterator[EncodeResult | Trouble | Throughput]:
    """Encode images on a cluster; yields one result for each, as `encode_files` does.

    Raises the reason of `stop`, an error that concerns every image, and CannotWrite.
    """
    inputs = swept(files, settings.outdir, settings.output)

    def work(engine: ClusterEngine, probe: Path) -> tuple[Iterator[Unit], Program]:
        setup = EncodeSetup(spec, replace(run, device=engine.device), settings, probe.stat().st_mtime)
        units = _encode_units(encode_units(inputs, settings, cell=spec.kind.cell))
        return units, Program(ENCODE, setup, os.getcwd(), str(probe))

    def done(event: ItemDone) -> Iterator[EncodeResult]:
        yield _encoded(_file_of(event.unit, event.item), event.values)

    def failed(event: UnitFailed) -> Iterator[EncodeResult]:
        files = (_file_of(event.unit, item) for item in event.items)
        yield from (EncodeResult("failed", file.path, error=event.error) for file in files)

    yield from results_on_cluster(work, cluster, settings.outdir, done=done, failed=failed, stop=stop)


def decode(
    files: Iterable[InputFile],
    registry: Registry,
    run: RunSettings,
    settings: DecodeSettings,
    cluster: ClusterSettings,
    *,
    model: str | None,
    stop: Stop,
) -> Iterator[DecodeResult | Trouble | Throughput]:
    """Decode latent files on a cluster; yields one result for each image, as `decode_files` does.

    Raises the reason of `stop`, an error that concerns every file, and CannotWrite.
    """
    if settings.resume:
        Journal(settings.outdir).take_in_parts()  # of runs that were killed
    part = secrets.token_hex(4)
    inputs = swept(files, settings.outdir, settings.output)

    def work(engine: ClusterEngine, probe: Path) -> tuple[Iterator[Unit], Program]:
        ours = replace(run, device=engine.device)
        setup = DecodeSetup(registry, model, ours, settings, part, probe.stat().st_mtime)
        units = (Unit(number, (number,), unit) for number, unit in enumerate(decode_units(inputs), start=1))
        return units, Program(DECODE, setup, os.getcwd(), str(probe), unit="file")

    def done(event: ItemDone) -> Iterator[DecodeResult]:
        yield from (_decoded(event.unit.payload, values) for values in event.values["results"])

    def failed(event: UnitFailed) -> Iterator[DecodeResult]:
        unit: DecodeUnit = event.unit.payload
        yield DecodeResult("failed", unit.file.path, error=event.error)

    yield from results_on_cluster(work, cluster, settings.outdir, done=done, failed=failed, stop=stop)
    Journal(settings.outdir).take_in_parts(part)


def _encode_units(units: Iterable[EncodeUnit]) -> Iterator[Unit]:
    first = 1
    for number, unit in enumerate(units, start=1):
        yield Unit(number, tuple(range(first, first + len(unit.files))), unit)
        first += len(unit.files)


def _file_of(unit: Unit, item: int) -> InputFile:
    files: Sequence[InputFile] = unit.payload.files
    return files[unit.items.index(item)]


def _error_of(values: dict[str, Any]) -> SdcliError | None:
    return unpacked_error(values["error"]) if "error" in values else None


def _encoded(file: InputFile, values: dict[str, Any]) -> EncodeResult:
    return EncodeResult(
        values["status"],
        file.path,
        None if values["path"] is None else Path(values["path"]),
        None if values["facts"] is None else Source.model_validate(values["facts"]),
        values["psnr"],
        tuple(values["notes"]),
        _error_of(values),
    )


def _decoded(unit: DecodeUnit, values: dict[str, Any]) -> DecodeResult:
    return DecodeResult(
        values["status"],
        unit.file.path,
        values["index"],
        None if values["path"] is None else Path(values["path"]),
        values["width"],
        values["height"],
        values["model"],
        tuple(values["notes"]),
        _error_of(values),
    )
