"""`encode` and `decode` on a worker: one unit through the VAE, written into the shared folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdcli.cluster.files_driver import DecodeSetup, EncodeSetup
from sdcli.cluster.units import Attempt, FromWork, ItemRow, Work
from sdcli.errors import Interrupted, OutOfMemory, SdcliError, packed_error
from sdcli.generation.decode_files import decode_unit
from sdcli.generation.decode_plan import DecodeResult, DecodeUnit
from sdcli.generation.encode_files import check_encoding, encode_unit
from sdcli.generation.encode_plan import EncodeResult, EncodeUnit
from sdcli.generation.journal import Journal
from sdcli.generation.model_cache import ModelCache


def start_encoding(setup: EncodeSetup) -> Work:
    """The function that encodes units, with the VAE loaded. Raises what loading raises, and UsageError."""
    cache = ModelCache(setup.run)
    with cache.lease_vae(setup.spec) as vae:
        check_encoding(vae, setup.settings)

    def work(attempt: Attempt, cancelled: Callable[[], bool]) -> Iterator[FromWork]:
        if cancelled():
            return
        unit: EncodeUnit = attempt.payload
        open_ = list(zip(unit.files, attempt.items, strict=True))
        too_large: SdcliError | None = None
        with cache.lease_vae(setup.spec) as vae:
            for result in encode_unit(unit, vae, setup.settings):
                pair = next(pair for pair in open_ if pair[0].path == result.source)
                open_.remove(pair)
                if isinstance(result.error, OutOfMemory):  # another worker may have more
                    too_large = result.error
                elif pair[1] not in attempt.done:
                    yield ItemRow(pair[1], _encoded(result, setup.began))
        if too_large is not None:
            raise too_large

    return work


class _DecodingStopped(Interrupted):
    """The driver wants no more images."""


def start_decoding(setup: DecodeSetup) -> Work:
    """The function that decodes latent files."""
    cache = ModelCache(setup.run)
    journal = Journal(setup.settings.outdir, part=f"{setup.part}-{secrets.token_hex(4)}")

    def work(attempt: Attempt, cancelled: Callable[[], bool]) -> Iterator[FromWork]:
        unit: DecodeUnit = attempt.payload
        # what an earlier attempt wrote is recognised as in a run that resumes
        settings = replace(setup.settings, resume=setup.settings.resume or attempt.number > 1)
        ways: dict[str, Any] = {"model": setup.model, "journal": journal}
        results = []
        try:
            for result in decode_unit(
                unit, setup.registry, cache, settings, **ways, stop=lambda: _DecodingStopped() if cancelled() else None
            ):
                if isinstance(result.error, OutOfMemory):
                    raise result.error
                results.append(_decoded(result, setup.began))
        except _DecodingStopped:
            return
        yield ItemRow(attempt.items[0], {"results": results})

    return work


def _encoded(result: EncodeResult, began: float) -> dict[str, Any]:
    facts = None if result.facts is None else result.facts.model_dump()
    return {**_common(result, began), "facts": facts, "psnr": result.psnr}


def _decoded(result: DecodeResult, began: float) -> dict[str, Any]:
    size = {"width": result.width, "height": result.height}
    return {**_common(result, began), "index": result.index, **size, "model": result.model}


def _common(result: EncodeResult | DecodeResult, began: float) -> dict[str, Any]:
    """What both results have as plain values. A file that is newer than the run is from an earlier attempt."""
    status = result.status
    if status == "skipped" and result.path is not None and _changed(result.path) >= began:
        status = "done"
    values: dict[str, Any] = {
        "status": status,
        "path": None if result.path is None else str(result.path),
        "notes": list(result.notes),
    }
    return values if result.error is None else {**values, "error": packed_error(result.error)}


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
