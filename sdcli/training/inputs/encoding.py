"""Encodes the data of denoisers once, into the cache: images to latents, captions to text states."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

from sdcli.data.cache.fill import fill_latents
from sdcli.data.cache.fill_texts import fill_texts
from sdcli.data.cache.keys import LATENTS, TEXTS, CachedLatents, CachedTexts, CacheVae, TextKeys
from sdcli.data.cache.networks import cache_text_encoder
from sdcli.data.cache.progress import CacheProgress
from sdcli.data.cache.store import TensorStore
from sdcli.data.records import Item
from sdcli.encoders.caption_encoder import CaptionEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.io.devices import free_memory
from sdcli.models.loaded_model import LoadedModel
from sdcli.training import model_parts
from sdcli.training.events import Event, Preparation, RunNote
from sdcli.training.inputs.captions import CaptionRules
from sdcli.training.inputs.conditioning import SampleConditioning, TextConditioning
from sdcli.training.inputs.image_data import ImageData
from sdcli.training.inputs.sources import Latents, Pixels
from sdcli.training.settings import DenoiserSettings, cache_folder
from sdcli.vae.autoencoder import scaling_factor

N = TypeVar("N", bound=nn.Module)
MAX_TEXT_BYTES = 2 * 2**30
"""Largest size of cached text states; to read more back takes longer than to encode them."""


def encode_images(
    data: ImageData, settings: DenoiserSettings, vae_of: LoadedModel, *, half: bool
) -> Generator[Event, None, Pixels | Latents]:
    """Fill the cache of latents and return the images from there, or as pixels where each sample is cropped anew.

    With `half` the VAE computes in bfloat16.
    """
    pixels = Pixels(data.images, data.bucketing, settings.seed, flip=settings.random_flip)
    if not settings.cache_latents or settings.random_crop:
        if settings.random_crop and settings.cache_latents:
            yield RunNote("latents are not cached, because --random-crop crops each sample anew")
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
    """Fill the cache of text states and return the captions from there, or as token ids where that is impossible.

    That is with shuffled captions, with too many of them, and with a text encoder that is `trained`, too. `template` is
    the model's own; with `ignored` every caption is empty.
    """
    rules = CaptionRules(
        dropout=settings.caption_dropout,
        shuffle=settings.shuffle_caption,
        keep=settings.keep_tokens,
        prefix=settings.caption_prefix,
        template=settings.prompt_template if settings.prompt_template is not None else template,
    )
    tokenizers = model_parts.tokenizers_of(text_of)
    texts = TextConditioning(data.images, rules, settings.seed, tokenizers=tokenizers, ignored=ignored)
    if not ignored:
        note = cut_captions(texts_of((data.images[int(index)] for index in data.used), rules), tokenizers[0])
        if note:
            yield RunNote(note)
    countable = [rules.all_texts(() if ignored else captions) for captions in data.texts()]
    if trained or None in countable:
        return texts
    wanted = sorted({text for some in countable if some for text in some})
    encoder = cache_text_encoder(text_of)
    # independent of free memory: a resumed run must compute the same
    if len(wanted) * encoder.network.numbers * 4 > MAX_TEXT_BYTES:
        size = f"{MAX_TEXT_BYTES / 2**30:.0f} GiB"
        yield RunNote(f"captions are encoded at each step, because their text states would take more than {size}")
        return texts
    store = TensorStore(cache_folder(settings.cache_dir), TEXTS)
    yield from _shown(fill_texts(wanted, encoder=encoder, store=store), "encoding captions")
    states = CachedTexts(store, TextKeys.of(encoder), wanted, budget=_budget())
    return TextConditioning(data.images, rules, settings.seed, states=states, ignored=ignored)


def texts_of(items: Iterable[Item], rules: CaptionRules) -> Iterator[tuple[str, str]]:
    """The name and the text of every caption, as it is encoded."""
    return ((item.name, rules.wrapped(caption)) for item in items for caption in item.captions)


def cut_captions(texts: Iterable[tuple[str, str]], tokenizer: ClipTokenizer) -> str:
    """A sentence about texts, by name, that are longer than the text encoder reads; "" if there are none."""
    limit = tokenizer.max_length - 2
    counts = [(name, tokenizer(text).count) for name, text in texts]
    long = {name: count for name, count in counts if count > limit}
    if not long:
        return ""
    cut, names = sum(count > limit for _, count in counts), list(long)
    return (
        f"{cut:,} of {len(counts):,} captions have more than the {limit} tokens that the text encoder reads, and are "
        f"cut (the longest has {max(long.values()):,}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    )


def computes_in_half(*, settings: DenoiserSettings, device: torch.device) -> bool:
    """Whether frozen networks compute in bfloat16: with --mixed-precision bf16 on a CPU."""
    return device.type == "cpu" and settings.mixed_precision == "bf16"


def frozen_text_encoder(text_of: LoadedModel, conditioning: SampleConditioning, *, half: bool) -> CaptionEncoder | None:
    """The text encoders for token ids, in bfloat16 with `half`; None where text states are cached."""
    if not isinstance(conditioning, TextConditioning) or conditioning.states is not None:
        return None
    encoder = text_of.family.caption_encoder(text_of)
    return _in_half(encoder) if half else encoder


def _in_half(frozen: N) -> N:
    """A copy of a frozen network in bfloat16; the original generates sample images in float32."""
    return copy.deepcopy(frozen).to(torch.bfloat16)


def _shown(filling: Iterator[CacheProgress], what: str) -> Generator[Event, None, CacheProgress]:
    """Yield a cache's progress as events; returns the last progress."""
    progress = None
    for progress in filling:
        for note in progress.notes:
            yield RunNote(note)
        yield Preparation(what, progress.done, progress.total)
    assert progress is not None
    return progress


def _budget() -> int:
    """Bytes of cached tensors to hold in memory: a quarter of the free memory."""
    return free_memory(torch.device("cpu")) // 4
