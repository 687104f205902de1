"""`dataset cache` on a cluster, the driver's side: parts of an examined data set become units, rows become figures.

The driver has examined the images; workers list them again, which reads none, and read those of their units. A unit
is what a process claims that fills the cache without a cluster, so that runs of both kinds share their work, too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdcli.cluster.ray_engine import ClusterSettings
from sdcli.cluster.results import results_on_cluster
from sdcli.cluster.run import ClusterEngine
from sdcli.cluster.units import ItemDone, Program, Throughput, Trouble, Unit, UnitFailed
from sdcli.data.cache.division import chunks_by_size, images_at_once, in_parts, texts_at_once, unit_length
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

    def units(engine: ClusterEngine, probe: Path) -> tuple[Iterator[Unit], Program]:
        batch = setup.run.batch_size or images_at_once(engine.device)
        run = replace(setup.run, device=engine.device, batch_size=batch)
        program = Program(CACHE, replace(setup, run=run), os.getcwd(), str(probe), unit="part")
        return units_of(work, images=batch, texts=texts_at_once(engine.device)), program

    setup.folder.mkdir(parents=True, exist_ok=True)
    yield from results_on_cluster(units, cluster, setup.folder, done=done, failed=failed, stop=stop)


def units_of(work: CacheWork, *, images: int, texts: int) -> Iterator[Unit]:
    """The units, of whole batches of so many images or texts, images first.

    Each run begins somewhere else, so that two do not wait for each other's claims.
    """
    digests = work.digests
    used = np.asarray(work.used, dtype=np.int64)
    chunks = chunks_by_size(work.sizes, unit_length(len(used), images))
    start = random.randrange(len(chunks)) if chunks else 0
    number = item = 0
    for chunk in (*chunks[start:], *chunks[:start]):
        places = [int(used[place]) for place in chunk]
        known = tuple(digests[place] if digests is not None else "" for place in places)
        unit = ImageUnit(tuple(places), work.sizes[int(chunk[0])], known)
        number, first = number + 1, item
        item += len(places)
        yield Unit(number, tuple(range(first, item)), unit)
    for part in in_parts(work.texts, unit_length(len(work.texts), texts)):
        number, first = number + 1, item
        item += len(part)
        yield Unit(number, tuple(range(first, item)), TextUnit(tuple(part)))


def _add(tallies: dict[Kind, CacheTally], event: ItemDone) -> None:
    values: dict[str, Any] = event.values
    tally = tallies["texts" if isinstance(event.unit.payload, TextUnit) else "latents"]
    if "reason" in values:
        tally.dropped.append(DroppedItem(values["name"], values["reason"]))
    elif values["encoded"]:
        tally.encoded += 1
    else:
        tally.reused += 1
