"""`dataset cache` on a worker: the images or texts of a unit through the encoder, into the shared cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sdcli.cluster.cache_driver import CacheSetup, ImageUnit, TextUnit
from sdcli.cluster.units import Attempt, FromWork, ItemRow, Work, Working, WorkRemark
from sdcli.data.cache.claims import Claims
from sdcli.data.cache.fill import fill_latents
from sdcli.data.cache.fill_texts import fill_texts
from sdcli.data.cache.keys import LATENTS, TEXTS
from sdcli.data.cache.networks import load_encoders
from sdcli.data.cache.progress import CacheProgress
from sdcli.data.cache.store import TensorStore
from sdcli.errors import Interrupted
from sdcli.training.inputs.image_data import list_data


class _FillingStopped(Interrupted):
    """The driver wants no more records."""


def start(setup: CacheSetup) -> Work:
    """The function that encodes units, with the networks loaded and the data listed."""
    return _CacheWorker(setup).do


class _CacheWorker:
    def __init__(self, setup: CacheSetup) -> None:
        self._vae, self._encoder = load_encoders(setup.spec, setup.run, texts=setup.texts)
        self._setup, self._images = setup, list_data(setup.data, setup.settings)
        self._latents, self._states = TensorStore(setup.folder, LATENTS), TensorStore(setup.folder, TEXTS)

    def do(self, attempt: Attempt, cancelled: Callable[[], bool]) -> Iterator[FromWork]:
        with Claims(self._setup.folder) as claims:
            try:
                last = None
                for progress in self._filling(attempt.payload, claims, cancelled):
                    last = progress
                    yield from (WorkRemark(note) for note in progress.notes)
                    yield Working(progress.done / max(1, progress.total))
            except _FillingStopped:
                return
        assert last is not None
        yield from self._rows(attempt, last)

    def _filling(
        self, unit: ImageUnit | TextUnit, claims: Claims, cancelled: Callable[[], bool]
    ) -> Iterator[CacheProgress]:
        def stop() -> Interrupted | None:
            return _FillingStopped() if cancelled() else None

        if isinstance(unit, TextUnit):
            assert self._encoder is not None
            store, length = self._states, len(unit.texts)
            return fill_texts(unit.texts, encoder=self._encoder, store=store, claims=claims, unit=length, stop=stop)
        return fill_latents(
            self._images,
            unit.used,
            [unit.size] * len(unit.used),
            vae=self._vae,
            store=self._latents,
            digests=dict(zip(unit.used, unit.digests, strict=True)),
            flips=self._setup.flips,
            batch_size=self._setup.run.batch_size,
            claims=claims,
            unit=len(unit.used),
            stop=stop,
        )

    def _rows(self, attempt: Attempt, last: CacheProgress) -> Iterator[ItemRow]:
        """A row for each item: dropped with its reason, encoded here, or in the cache already."""
        unit: ImageUnit | TextUnit = attempt.payload
        dropped: dict[str, str] = {}
        names = [""] * len(attempt.items)
        if isinstance(unit, ImageUnit):
            assert last.latents is not None
            dropped = {one.name: one.reason for one in last.latents.dropped}
            names = [self._images[index].name for index in unit.used]
        encoded = last.encoded
        for item, name in zip(attempt.items, names, strict=True):
            if name in dropped:
                yield ItemRow(item, {"name": name, "reason": dropped[name]})
            else:
                yield ItemRow(item, {"encoded": encoded > 0})
                encoded -= 1
