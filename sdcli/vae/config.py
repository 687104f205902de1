"""Facts about a VAE's latents that follow from its configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cell_of(vae: Mapping[str, Any]) -> int:
    """Pixels per side of one latent cell: a VAE halves its input between its blocks."""
    widths = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return 2 ** (len(widths) - 1) if isinstance(widths, list | tuple) and 1 <= len(widths) <= 8 else 8
