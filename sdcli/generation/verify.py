"""Generate an image again from its own record, and compare: identical, or which weights and versions differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from sdcli.diffusion.attention.sliced import SLICED, WAYS
from sdcli.errors import BadOutput, UsageError
from sdcli.generation.events import Failed, Generated
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.plan import Batch
from sdcli.generation.provenance import provenance
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.run_batch import run_batch
from sdcli.generation.settings import RunSettings
from sdcli.images.image_files import pixels_digest
from sdcli.images.metrics import distance
from sdcli.images.pixels import from_pixels
from sdcli.metadata.read import read_image
from sdcli.models.registry import Registry
from sdcli.request.schema import ResolvedRequest, first_problem


@dataclass(frozen=True)
class Verdict:
    """The comparison of an image with the one generated again."""

    path: str
    identical: bool
    max_difference: int | None
    """The largest difference of any channel of any pixel, 0..255; None where the sizes differ."""
    psnr: float | None
    """Decibels; None for equal pixels or other sizes."""
    edited: bool
    """The file's own pixels are no longer those that were generated (lossless formats only)."""
    differences: tuple[str, ...]
    """Weights, versions, device and dtype that differ from the record."""

    def sentence(self) -> str:
        """One line for people."""
        if self.identical and not self.edited:
            return f"{self.path}: identical"
        if self.identical:
            return f"{self.path}: generated again as recorded, but the file was edited since"
        size = (
            f"pixels differ by up to {self.max_difference} of 255" if self.max_difference is not None else "other size"
        )
        quality = f" (PSNR {self.psnr:.1f} dB)" if self.psnr is not None else ""
        causes = "; ".join(self.differences) or "weights, versions, device and dtype are as recorded"
        return f"{self.path}: {size}{quality}; {causes}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def raise_if_different(self) -> None:
        """Raises BadOutput unless the image is identical."""
        if not self.identical or self.edited:
            raise BadOutput("the image did not verify")


def verify_image(path: Path, registry: Registry, run: RunSettings) -> Verdict:
    """Generate the request in an image's record, in a batch of the recorded size and at the same place in it.

    Raises UsageError for an image without an sdcli record, and what generating raises.
    """
    info = read_image(path)
    if info.record is None:
        raise UsageError(f"{path} holds no sdcli record, so there is nothing to verify against")
    facts = info.record.provenance
    if run.dtype == "auto" and facts.get("dtype") in ("float32", "bfloat16", "float16"):
        run = replace(run, dtype=facts["dtype"])
    attention = facts.get("attention", SLICED)  # the only way when none was recorded yet
    if run.attention == "auto" and attention in WAYS:
        run = replace(run, attention=attention)
    batch = facts.get("batch") or {}
    size, position = (batch.get("size", 1), batch.get("index", 0)) if isinstance(batch, dict) else (None, None)
    if not (isinstance(size, int) and isinstance(position, int) and 0 <= position < size <= 256):
        raise UsageError(f"{path}: its record has an impossible batch, {batch!r}")
    try:
        request = ResolvedRequest.model_validate(dict(info.record.request))
    except ValidationError as invalid:
        raise UsageError(f"{path}: its record is incomplete: {first_problem(invalid)}") from None
    jobs = [ResolvedJob.of(index, request, registry) for index in range(size)]
    with ModelCache(replace(run, safety="off")).lease(jobs[0]) as lease:
        for event in run_batch(lease, Batch(tuple(jobs), frozenset({position}))):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Generated):
                now = provenance(lease.pipeline, fallbacks=event.fallbacks)
                return _compare(path, facts, from_pixels(event.pixels), now)
    raise AssertionError("run_batch ends each wanted job")


def _compare(path: Path, then: dict[str, Any], image: Image.Image, now: dict[str, Any]) -> Verdict:
    with Image.open(path) as opened:
        lossless, stored = opened.format == "PNG", opened.convert("RGB")
    apart = distance(stored, image)
    digest = then.get("pixels")
    identical = pixels_digest(image) == digest if digest else apart is not None and apart.largest == 0
    return Verdict(
        path=str(path),
        identical=identical,
        max_difference=apart.largest if apart is not None else None,
        psnr=apart.psnr if apart is not None and math.isfinite(apart.psnr) else None,
        edited=bool(digest) and lossless and pixels_digest(stored) != digest,
        differences=tuple(_differences(then, now)),
    )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    before, after = then.get("weights"), now["weights"]
    before = before if isinstance(before, dict) else {}
    for part in sorted(set(before) | set(after)):
        if before.get(part) != after.get(part):
            found.append(
                f"the {part} has other weights ({_short(after.get(part))}, recorded {_short(before.get(part))})"
            )
    for name in ("sdcli", "torch", "diffusers", "device", "hardware", "dtype", "attention"):
        if name in then and then[name] != now.get(name):
            found.append(f"{name} {now.get(name)}, recorded {then[name]}")
    return found


def _short(identity: Any) -> str:
    return str(identity)[:19]
