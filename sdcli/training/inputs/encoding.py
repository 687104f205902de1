"""What a denoiser learns from, encoded once and kept where that can be: images as latents, captions as states."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch
from torch import nn

from sdcli.data.cache.fill import CacheProgress, fill_latents, fill_texts
from sdcli.data.cache.keys import LATENTS, TEXTS, CachedLatents, CachedTexts, CacheTextEncoder, CacheVae, TextKeys
from sdcli.data.cache.store import TensorStore
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.io.devices import free_memory
from sdcli.models.loader import LoadedModel
from sdcli.training import model_parts
from sdcli.training.events import Event, Preparation, RunNote
from sdcli.training.inputs.captions import CaptionRules
from sdcli.training.inputs.conditioning import SampleConditioning, TextConditioning
from sdcli.training.inputs.image_data import ImageData
from sdcli.training.inputs.sources import Latents, Pixels
from sdcli.training.settings import DenoiserSettings, cache_folder
from sdcli.vae.autoencoder import scaling_factor

N = TypeVar("N", bound=nn.Module)
MOST_TEXT_BYTES = 2 * 2**30
"""Text states that are cached; beyond, reading them back costs more than encoding them."""


def encode_images(
    data: ImageData, settings: DenoiserSettings, vae_of: LoadedModel, *, half: bool
) -> Generator[Event, None, Pixels | Latents]:
    """The images as latents from the cache, which is filled, or as pixels where each sample is cut anew.

    `half`: the VAE computes in bfloat16, as `load_model` in that format gives it.
    """
    pixels = Pixels(data.images, data.framing, settings.seed, flip=settings.random_flip)
    if not settings.cache_latents or settings.random_crop:
        if settings.random_crop and settings.cache_latents:
            yield RunNote("latents are not cached: --random-crop cuts each sample anew, so it is encoded each time")
        return pixels
    store = TensorStore(cache_folder(settings.cache_dir), LATENTS)
    filling = fill_latents(
        data.images,
        data.used,
        [data.sizes[int(index)] for index in data.used],
        vae=CacheVae(_in_half(vae_of.vae) if half else vae_of.vae, vae_of.identity("vae")),
        store=store,
        digests=data.digests,
        flips=settings.random_flip,
    )
    last = yield from _shown(filling, "encoding images")
    assert last.latents is not None
    for dropped in last.latents.dropped:
        yield RunNote(f"dropped {dropped.name}: {dropped.reason}")
    cached = CachedLatents(store, last.latents, budget=_budget())
    return Latents(cached, scaling_factor(vae_of.vae), settings.seed, flip=settings.random_flip)


def encode_captions(
    data: ImageData,
    settings: DenoiserSettings,
    text_of: LoadedModel,
    *,
    template: str,
    ignored: bool = False,
    trained: bool = False,
) -> Generator[Event, None, TextConditioning]:
    """The captions as text states from the cache, which is filled, or as token ids where they are too many or change.

    `template` is the model's own; `ignored`: every caption is empty; `trained`: the text encoder learns along.
    """
    rules = CaptionRules(
        dropout=settings.caption_dropout,
        shuffle=settings.shuffle_caption,
        keep=settings.keep_tokens,
        prefix=settings.caption_prefix,
        template=settings.prompt_template if settings.prompt_template is not None else template,
    )
    tokenizer: ClipTokenizer = model_parts.tokenizer_of(text_of)
    texts = TextConditioning(data.images, rules, settings.seed, tokenizer=tokenizer, ignored=ignored)
    countable = [rules.all_texts(() if ignored else captions) for captions in data.texts()]
    if trained or None in countable:
        return texts
    wanted = sorted({text for some in countable if some for text in some})
    config = text_of.text_encoder.config
    # not by the memory that is free: a run must not compute otherwise when it is resumed
    if len(wanted) * config.max_position_embeddings * config.hidden_size * 4 > MOST_TEXT_BYTES:
        size = f"{MOST_TEXT_BYTES / 2**30:.0f} GiB"
        yield RunNote(f"captions are encoded as they are needed: their text states would take more than {size}")
        return texts
    store = TensorStore(cache_folder(settings.cache_dir), TEXTS)
    encoder = CacheTextEncoder(text_of.text_encoder, tokenizer, text_of.identity("text_encoder"), text_of.spec.name)
    yield from _shown(fill_texts(wanted, encoder=encoder, store=store), "encoding captions")
    states = CachedTexts(store, TextKeys.of(encoder), wanted, budget=_budget())
    return TextConditioning(data.images, rules, settings.seed, states=states, ignored=ignored)


def computes_in_half(*, settings: DenoiserSettings, device: torch.device) -> bool:
    """Whether frozen networks compute in bfloat16: on a CPU that trains so."""
    return device.type == "cpu" and settings.mixed_precision == "bf16"


def frozen_text_encoder(text_of: LoadedModel, conditions: SampleConditioning, *, half: bool) -> nn.Module | None:
    """What encodes the captions during training, in bfloat16 if `half`; None where their states are cached."""
    if not isinstance(conditions, TextConditioning) or conditions.states is not None:
        return None
    return _in_half(text_of.text_encoder) if half else text_of.text_encoder


def _in_half(frozen: N) -> N:
    """A frozen network in bfloat16: a copy, since float32 generates images."""
    return copy.deepcopy(frozen).to(torch.bfloat16)


def _shown(filling: Iterator[CacheProgress], what: str) -> Generator[Event, None, CacheProgress]:
    """A cache's progress as events; returns the last one."""
    progress = None
    for progress in filling:
        for note in progress.notes:
            yield RunNote(note)
        yield Preparation(what, progress.done, progress.total)
    assert progress is not None
    return progress


def _budget() -> int:
    """Bytes of cached tensors that may be held in memory: a quarter of what is free."""
    return free_memory(torch.device("cpu")) // 4
