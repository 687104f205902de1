"""The progress of filling the cache. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdcli.data.cache.keys import LatentIndex


@dataclass(frozen=True)
class CacheProgress:
    """Progress in images (or texts). An image and its mirrored version count as one."""

    done: int
    total: int
    encoded: int = 0
    reused: int = 0
    dropped: int = 0
    seconds: float = 0.0
    """Since the start."""
    waiting: float = 0.0
    """Seconds in which the encoder waited for images."""
    notes: tuple[str, ...] = ()
    """New messages: damaged files of the cache, and fallbacks for lack of memory or precision."""
    latents: LatentIndex | None = None
    """The index of the latents; in the last value only, when everything is on the disk."""
