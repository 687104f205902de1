"""`dataset cache` on a cluster, the driver's side: parts of an examined data set become units, rows become figures.

The driver has examined the images; workers list them again, which reads none, and read those of their units. A unit
is what a process claims that fills the cache without a cluster, so that runs of both kinds share their work, too.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdcli.cluster.files_driver import results_of
from sdcli.cluster.ray_engine import ClusterSettings, RayEngine
from sdcli.cluster.run import probe_file, run_units
from sdcli.cluster.scheduler import UnitScheduler
from sdcli.cluster.units import ItemDone, Program, Throughput, Trouble, Unit, UnitFailed
from sdcli.data.cache.division import chunks_by_size, in_parts, unit_length
from sdcli.data.records import DroppedItem
from sdcli.errors import SdcliError, Stop
from sdcli.generation.settings import RunSettings
from sdcli.models.registry import ModelSpec
from sdcli.training.settings import ImageSettings

CACHE = "sdcli.cluster.cache_worker:start"
Size = tuple[int, int]
Kind = Literal["latents", "texts"]


@dataclass(frozen=True)
class CacheSetup:
    """What the workers that fill a cache need to know once."""

    data: str
    settings: ImageSettings
    spec: ModelSpec
    run: RunSettings
    """`batch_size` is that of images."""
    folder: Path
    flips: bool
    texts: bool
    """Whether the text encoder is needed."""


@dataclass(frozen=True)
class ImageUnit:
    """Images of one size: their places in the data set, and the digests of their files, "" where not known."""

    used: tuple[int, ...]
    size: Size
    digests: tuple[str, ...]


@dataclass(frozen=True)
class TextUnit:
    """Texts to encode."""

    texts: tuple[str, ...]


@dataclass
class CacheTally:
    """What became of the images, or of the texts, of a run so far."""

    total: int
    encoded: int = 0
    reused: int = 0
    dropped: list[DroppedItem] = field(default_factory=list)


@dataclass(frozen=True)
class CacheWork:
    """A data set for the cache: which images at which sizes, and which texts. `digests` are by item."""

    used: Sequence[int] | np.ndarray
    sizes: Sequence[Size]
    digests: Sequence[str] | None
    texts: Sequence[str]


@dataclass(frozen=True)
class CacheFailed:
    """Images or texts that no worker could encode."""

    kind: Kind
    count: int
    error: SdcliError


def fill_on_cluster(
    work: CacheWork, setup: CacheSetup, cluster: ClusterSettings, tallies: dict[Kind, CacheTally], *, stop: Stop
) -> Iterator[CacheFailed | Trouble | Throughput]:
    """Fill a cache on a cluster; the tallies of latents and texts are brought up to date on the way.

    Raises the reason of `stop`, an error that concerns every image, and CannotWrite.
    """

    def done(event: ItemDone) -> Iterator[CacheFailed]:
        _add(tallies, event)
        return iter(())

    def failed(event: UnitFailed) -> Iterator[CacheFailed]:
        kind: Kind = "texts" if isinstance(event.unit.payload, TextUnit) else "latents"
        yield CacheFailed(kind, len(event.items), event.error)

    setup.folder.mkdir(parents=True, exist_ok=True)
    with RayEngine(cluster) as engine, probe_file(setup.folder) as probe:
        batch = setup.run.batch_size or (1 if engine.device == "cpu" else 8)
        run = replace(setup.run, device=engine.device, batch_size=batch)
        units = units_of(work, batch=batch)
        first = list(itertools.islice(units, engine.workers))
        if not first:
            return
        program = Program(CACHE, replace(setup, run=run), os.getcwd(), str(probe), unit="part")
        scheduler = UnitScheduler(itertools.chain(first, units))
        events = run_units(engine, scheduler, program, stop=stop, most=len(first))
        yield from results_of(events, done, failed)


def units_of(work: CacheWork, *, batch: int) -> Iterator[Unit]:
    """The units, images first. Each run begins somewhere else, so that two do not wait for each other's claims."""
    digests = work.digests
    used = np.asarray(work.used, dtype=np.int64)
    chunks = chunks_by_size(work.sizes, unit_length(len(used), batch))
    start = random.randrange(len(chunks)) if chunks else 0
    number = item = 0
    for chunk in (*chunks[start:], *chunks[:start]):
        places = [int(used[place]) for place in chunk]
        known = tuple(digests[place] if digests is not None else "" for place in places)
        unit = ImageUnit(tuple(places), work.sizes[int(chunk[0])], known)
        number, first = number + 1, item
        item += len(places)
        yield Unit(number, tuple(range(first, item)), unit)
    for texts in in_parts(work.texts, unit_length(len(work.texts), 1 if batch == 1 else 64)):
        number, first = number + 1, item
        item += len(texts)
        yield Unit(number, tuple(range(first, item)), TextUnit(tuple(texts)))


def _add(tallies: dict[Kind, CacheTally], event: ItemDone) -> None:
    values: dict[str, Any] = event.values
    tally = tallies["texts" if isinstance(event.unit.payload, TextUnit) else "latents"]
    if "reason" in values:
        tally.dropped.append(DroppedItem(values["name"], values["reason"]))
    elif values["encoded"]:
        tally.encoded += 1
    else:
        tally.reused += 1
