"""The networks whose outputs `dataset cache` stores, loaded as it needs them."""

from __future__ import annotations

from typing import Any

from sdcli.data.cache.keys import CacheTextEncoder, CacheVae
from sdcli.generation.settings import RunSettings
from sdcli.io.devices import pick_device, pick_precision
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec


def load_encoders(spec: ModelSpec, run: RunSettings, *, texts: bool) -> tuple[CacheVae, CacheTextEncoder | None]:
    """The VAE of a model and, for `texts`, its text encoders, in the run's dtype.

    `auto` is what training with `--mixed-precision auto` reads: bfloat16 or float32. Raises what `load_model` raises.
    """
    dtype = run.dtype
    if dtype == "auto":
        device = pick_device(run.device)
        dtype = "bfloat16" if device.type == "cpu" and pick_precision(device) == "bf16" else "float32"
    encoders: list[Any] = []
    if texts:
        spec.family.refuse("train", spec.name)
        encoders = [part for part in spec.family.components()[1] if part.startswith("text_encoder")]
    loaded = load_model(spec, device=run.device, dtype=dtype, offline=run.offline, parts=("vae", *encoders))
    vae = CacheVae(loaded.vae, loaded.identity("vae"))
    return vae, cache_text_encoder(loaded) if texts else None


def cache_text_encoder(model: LoadedModel) -> CacheTextEncoder:
    """All text encoders of a loaded model."""
    network = model.family.caption_encoder(model)
    return CacheTextEncoder(network, tuple(map(model.identity, model.tokenizers)), model.spec.name)
