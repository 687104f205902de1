"""`encode` and `decode` on a cluster, the driver's side: files become units, rows become results. Imports no torch.

The units are those of one process, made from the headers of the files, so that what is encoded together does not depend
on who does it. Workers write the files themselves; a file that an earlier attempt wrote is recognised by its content.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sdcli.cluster.ray_engine import ClusterSettings, RayEngine
from sdcli.cluster.run import ClusterEngine, probe_file, run_units
from sdcli.cluster.scheduler import UnitScheduler
from sdcli.cluster.units import ItemDone, Program, Remarked, RunEvent, Throughput, Trouble, Unit, UnitFailed
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

R = TypeVar("R")


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
    units = _encode_units(encode_units(inputs, settings, cell=spec.kind.cell))

    def program(engine: ClusterEngine, probe: Path) -> Program:
        setup = EncodeSetup(spec, replace(run, device=_device(engine)), settings, probe.stat().st_mtime)
        return Program(ENCODE, setup, os.getcwd(), str(probe))

    def done(event: ItemDone) -> Iterator[EncodeResult]:
        yield _encoded(_file_of(event.unit, event.item), event.values)

    def failed(event: UnitFailed) -> Iterator[EncodeResult]:
        files = (_file_of(event.unit, item) for item in event.items)
        yield from (EncodeResult("failed", file.path, error=event.error) for file in files)

    yield from _run(units, cluster, settings.outdir, program, done, failed, stop)


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
        Journal.open(settings.outdir).take_in_parts()  # of runs that were killed
    part = secrets.token_hex(4)
    inputs = swept(files, settings.outdir, settings.output)
    units = (Unit(number, (number,), unit) for number, unit in enumerate(decode_units(inputs), start=1))

    def program(engine: ClusterEngine, probe: Path) -> Program:
        ours = replace(run, device=_device(engine))
        setup = DecodeSetup(registry, model, ours, settings, part, probe.stat().st_mtime)
        return Program(DECODE, setup, os.getcwd(), str(probe), unit="file")

    def done(event: ItemDone) -> Iterator[DecodeResult]:
        yield from (_decoded(event.unit.payload, values) for values in event.values["results"])

    def failed(event: UnitFailed) -> Iterator[DecodeResult]:
        unit: DecodeUnit = event.unit.payload
        yield DecodeResult("failed", unit.file.path, error=event.error)

    yield from _run(units, cluster, settings.outdir, program, done, failed, stop)
    Journal.open(settings.outdir).take_in_parts(part)


def _run(
    units: Iterator[Unit],
    cluster: ClusterSettings,
    folder: Path,
    program: Callable[[ClusterEngine, Path], Program],
    done: Callable[[ItemDone], Iterator[R]],
    failed: Callable[[UnitFailed], Iterator[R]],
    stop: Stop,
) -> Iterator[R | Trouble | Throughput]:
    with RayEngine(cluster) as engine, probe_file(folder) as probe:
        first = list(itertools.islice(units, engine.workers))  # no more workers than units
        if not first:
            return
        scheduler = UnitScheduler(itertools.chain(first, units), one_need=True)
        events = run_units(engine, scheduler, program(engine, probe), stop=stop, most=len(first))
        yield from results_of(events, done, failed)


def results_of(
    events: Iterable[RunEvent], done: Callable[[ItemDone], Iterator[R]], failed: Callable[[UnitFailed], Iterator[R]]
) -> Iterator[R | Trouble | Throughput]:
    """The results in the events of a run, and what the user is to see of the rest."""
    for event in events:
        match event:
            case ItemDone():
                yield from done(event)
            case UnitFailed():
                yield from failed(event)
            case Remarked(text=text):
                yield Trouble(text)
            case Trouble() | Throughput():
                yield event


def _encode_units(units: Iterable[EncodeUnit]) -> Iterator[Unit]:
    first = 1
    for number, unit in enumerate(units, start=1):
        yield Unit(number, tuple(range(first, first + len(unit.files))), unit)
        first += len(unit.files)


def _device(engine: ClusterEngine) -> str:
    device: str = getattr(engine, "device", "cpu")
    return device


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
