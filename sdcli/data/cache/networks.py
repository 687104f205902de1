"""The networks whose outputs `dataset cache` stores, loaded as it needs them."""

from __future__ import annotations

from sdcli.data.cache.keys import CacheTextEncoder, CacheVae
from sdcli.generation.settings import RunSettings
from sdcli.io.devices import pick_device, pick_precision
from sdcli.models.loader import Part, load_model
from sdcli.models.registry import ModelSpec


def load_encoders(spec: ModelSpec, run: RunSettings, *, texts: bool) -> tuple[CacheVae, CacheTextEncoder | None]:
    """The VAE of a model and, for `texts`, its text encoder, in the run's dtype.

    `auto` is what training with `--mixed-precision auto` reads: bfloat16 or float32. Raises what `load_model` raises.
    """
    parts: tuple[Part, ...] = ("vae", "text_encoder") if texts else ("vae",)
    dtype = run.dtype
    if dtype == "auto":
        device = pick_device(run.device)
        dtype = "bfloat16" if device.type == "cpu" and pick_precision(device) == "bf16" else "float32"
    loaded = load_model(spec, device=run.device, dtype=dtype, offline=run.offline, parts=parts)
    vae = CacheVae(loaded.vae, loaded.identity("vae"))
    if not texts:
        return vae, None
    assert loaded.tokenizer is not None
    return vae, CacheTextEncoder(loaded.text_encoder, loaded.tokenizer, loaded.identity("text_encoder"), spec.name)
