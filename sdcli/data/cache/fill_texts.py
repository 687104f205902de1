"""Fills the cache of text states: encodes texts to hidden states, except those that it already contains."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Generator, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sdcli.data.cache.claims import Claims
from sdcli.data.cache.division import WAITING, Division, in_parts, texts_at_once, unit_length
from sdcli.data.cache.fill import damage_notes
from sdcli.data.cache.keys import CacheTextEncoder, TextKeys
from sdcli.data.cache.progress import CacheProgress
from sdcli.data.cache.shards import KEY_BYTES
from sdcli.data.cache.store import TensorStore
from sdcli.encoders.caption_encoder import token_ids
from sdcli.errors import BadOutput, Stop, stop_if_asked


def fill_texts(
    texts: Iterable[str],
    *,
    encoder: CacheTextEncoder,
    store: TensorStore,
    batch_size: int | None = None,
    claims: Claims | None = None,
    unit: int | None = None,
    stop: Stop = lambda: None,
) -> Generator[CacheProgress, None, None]:
    """Encode texts, each once: their states in the encoder's number format, as `generate` computes them.

    One at a time on the CPU, where the states are bit for bit those of `generate`, else 64. `claims` and `unit` are
    those of `fill_latents`. Raises what `stop` returns, CannotWrite, and BadOutput where the text encoder gives NaN, in
    float32 too.
    """
    keys, began = TextKeys.of(encoder), time.perf_counter()
    store.refresh()
    wanted = {keys.key(text): text for text in texts}
    absent = _absent(list(wanted), store)
    at_once = batch_size or texts_at_once(encoder.device.type)
    total, encoded, waited = len(wanted), 0, False

    def progress(notes: tuple[str, ...] = ()) -> CacheProgress:
        seconds, done = time.perf_counter() - began, total - len(absent)
        return CacheProgress(done, total, encoded, done - encoded, seconds=seconds, notes=notes)

    def is_done(unit: Sequence[bytes]) -> bool:
        absent.difference_update(key for key in unit if key in absent and key in store)
        return absent.isdisjoint(unit)

    def name_of(unit: Sequence[bytes]) -> str:
        return hashlib.sha256(b"".join(unit)).hexdigest()[:32]

    yield progress(damage_notes(store))
    length = len(wanted) if claims is None else unit or unit_length(len(wanted), at_once)
    units = in_parts(list(wanted), max(1, length))
    division = Division(store, claims, stop)
    try:
        for some in division.turns(units, name=name_of, is_done=is_done):
            if some is None:
                yield progress(() if waited else (WAITING,))
                waited = True
                continue
            for batch in in_parts([key for key in some if key in absent], at_once):
                stop_if_asked(stop)
                states = _states(encoder, [wanted[key] for key in batch])
                for place, key in enumerate(batch):
                    store.add(key, {name: rows[place] for name, rows in states.items()})
                absent.difference_update(batch)
                encoded += len(batch)
                yield progress()
    finally:
        division.flush()


def _absent(keys: Sequence[bytes], store: TensorStore) -> set[bytes]:
    """Those of the keys that the store lacks."""
    numbers = store.find(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES))
    return {key for key, number in zip(keys, numbers, strict=True) if number < 0}


@torch.inference_mode()
def _states(encoder: CacheTextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """The encoder's output for some texts, on the CPU in the model's dtype. Raises BadOutput."""
    ids = torch.stack([token_ids(encoder.network.tokenizers, text) for text in texts]).to(encoder.device)
    states: dict[str, Tensor] = encoder.network(ids)
    if not _finite(states) and encoder.dtype != torch.float32:
        states = {name: rows.to(encoder.dtype) for name, rows in copy.deepcopy(encoder.network).float()(ids).items()}
    if not _finite(states):
        raise BadOutput(f"the text encoder of {encoder.model} gives NaN or infinite numbers; is the model damaged?")
    return {name: rows.cpu() for name, rows in states.items()}


def _finite(states: Mapping[str, Tensor]) -> bool:
    return all(bool(rows.isfinite().all()) for rows in states.values())
