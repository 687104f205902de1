"""The two ways in which `sdcli dataset cache` encodes: in this process, and on the workers of a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.cli.ui.console import Console
from sdcli.errors import SdcliError, Stop
from sdcli.generation.run_shard import RunShard
from sdcli.generation.settings import RunSettings
from sdcli.models.registry import ModelSpec
from sdcli.training.settings import ImageSettings

if TYPE_CHECKING:
    from sdcli.cli.ui.training_progress import TrainingProgress
    from sdcli.cluster.ray_engine import ClusterSettings
    from sdcli.data.cache.progress import CacheProgress
    from sdcli.data.records import DroppedItem
    from sdcli.training.inputs.image_data import ImageData


@dataclass(frozen=True)
class CacheRun:
    """What is to be encoded, for which model, and where it goes."""

    data: str
    found: ImageData
    settings: ImageSettings
    spec: ModelSpec
    run: RunSettings
    """`batch_size` is that of images."""
    folder: Path
    prefix: str
    template: str
    """Around captions, with {prompt}."""

    @property
    def texts(self) -> list[str]:
        """Every text that training can sample, with the empty one for dropped captions; none without a text encoder."""
        from sdcli.training.inputs.captions import CaptionRules

        if not self.spec.family.reads_text:
            return []
        rules = CaptionRules(prefix=self.prefix, template=self.template)
        return list(dict.fromkeys(text for captions in self.found.texts() for text in rules.all_texts(captions) or ()))


@dataclass(frozen=True)
class CacheOutcome:
    """What became of a run: images, texts where there is a text encoder, and images that could not be encoded."""

    pictures: CacheProgress
    texts: CacheProgress | None
    dropped: Sequence[DroppedItem]
    errors: Sequence[SdcliError] = ()
    """One for each image or text that no worker could encode."""


def fill_here(
    what: CacheRun,
    display: TrainingProgress,
    console: Console,
    *,
    part: RunShard | None,
    workers: int | None,
    stop: Stop,
) -> CacheOutcome:
    """Encode images and texts, or those of a shard, in this process."""
    from sdcli.data.cache.claims import Claims
    from sdcli.data.cache.division import images_at_once, places_of_shard
    from sdcli.data.cache.fill import fill_latents
    from sdcli.data.cache.fill_texts import fill_texts
    from sdcli.data.cache.keys import LATENTS, TEXTS
    from sdcli.data.cache.networks import load_encoders
    from sdcli.data.cache.store import TensorStore
    from sdcli.training.inputs.captions import CaptionRules
    from sdcli.training.inputs.encoding import cut_captions, texts_of

    spec, found, run = what.spec, what.found, what.run
    console.note(f"loading {spec.name}")
    vae, encoder = load_encoders(spec, run, texts=spec.family.reads_text)
    used, sizes = found.used, [found.sizes[int(index)] for index in found.used]
    if part is not None:
        places = places_of_shard(sizes, part, batch=run.batch_size or images_at_once(vae.device.type))
        used, sizes = used[places], [sizes[int(place)] for place in places]
    latents, states, claims = TensorStore(what.folder, LATENTS), TensorStore(what.folder, TEXTS), Claims(what.folder)
    with latents, states, claims:
        filling = fill_latents(
            found.images,
            used,
            sizes,
            vae=vae,
            store=latents,
            digests=found.digests,
            flips=what.settings.random_flip,
            batch_size=run.batch_size,
            workers=workers,
            claims=claims,
            stop=stop,
        )
        of_pictures = _shown(filling, "encoding images", display, console)
        assert of_pictures.latents is not None
        dropped = of_pictures.latents.dropped
        if encoder is None:
            return CacheOutcome(of_pictures, None, dropped)
        texts = what.texts if part is None else list(part.part(what.texts))
        items = (found.images[int(index)] for index in found.used)
        rules = CaptionRules(prefix=what.prefix, template=what.template)
        note = cut_captions(texts_of(items, rules), encoder.network.tokenizers[0])
        if note:
            console.warn(note)
        filling = fill_texts(texts, encoder=encoder, store=states, claims=claims, stop=stop)
        return CacheOutcome(of_pictures, _shown(filling, "encoding captions", display, console), dropped)


def fill_on_workers(what: CacheRun, cluster: ClusterSettings, console: Console, *, stop: Stop) -> CacheOutcome:
    """Encode images and texts on a cluster. Imports no torch."""
    from sdcli.cli.cluster_results import results_of_cluster
    from sdcli.cluster.cache_driver import CacheSetup, CacheTally, CacheWork, Kind, fill_on_cluster
    from sdcli.data.cache.progress import CacheProgress

    spec, found, texts = what.spec, what.found, what.texts
    sizes = [found.sizes[int(index)] for index in found.used]
    work = CacheWork(found.used, sizes, found.digests, texts)
    flips, reads = what.settings.random_flip, spec.family.reads_text
    setup = CacheSetup(what.data, what.settings, spec, what.run, what.folder, flips, reads)
    tallies: dict[Kind, CacheTally] = {"latents": CacheTally(len(found.used)), "texts": CacheTally(len(texts))}
    began, errors = time.perf_counter(), list[SdcliError]()
    events = fill_on_cluster(work, setup, cluster, tallies, stop=stop)
    for failed in results_of_cluster(events, console, total=len(found.used) + len(texts), things="records"):
        console.warn(f"{failed.count:,} of the {failed.kind} are not in the cache: {failed.error}")
        errors += [failed.error] * failed.count
    seconds = time.perf_counter() - began

    def progress(tally: CacheTally) -> CacheProgress:
        encoded, reused, dropped = tally.encoded, tally.reused, len(tally.dropped)
        done = encoded + reused + dropped
        return CacheProgress(done, tally.total, encoded, reused, dropped, seconds=seconds)

    of_texts = progress(tallies["texts"]) if reads else None
    return CacheOutcome(progress(tallies["latents"]), of_texts, tallies["latents"].dropped, errors)


def _shown(filling: Iterable[CacheProgress], what: str, display: TrainingProgress, console: Console) -> CacheProgress:
    """Consume the progress, showing it on stderr; return the last one."""
    from sdcli.training.events import Preparation

    last = None
    for progress in filling:
        if last is None or progress.done != last.done:
            display.report(Preparation(what, progress.done, progress.total))
        for note in progress.notes:
            console.warn(note)
        last = progress
    assert last is not None
    return last
