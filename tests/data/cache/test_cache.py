"""The training cache: what is found again and what is not, to the bit; broken files, and processes that are killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from sdcli.cli import dataset_cache
from sdcli.data.buckets import resize_and_crop
from sdcli.data.cache import store as cache_store
from sdcli.data.cache.fill import fill_latents
from sdcli.data.cache.fill_texts import fill_texts
from sdcli.data.cache.keys import (
    CachedLatents,
    CachedTexts,
    CacheTextEncoder,
    CacheVae,
    Crop,
    EncodedLatents,
    LatentIndex,
    LatentKeys,
    TextKeys,
    check_same_vae,
    sample_latents,
)
from sdcli.data.cache.networks import cache_text_encoder
from sdcli.data.cache.progress import CacheProgress
from sdcli.data.cache.records import Records
from sdcli.data.cache.shards import DamagedCache
from sdcli.data.cache.store import TensorStore
from sdcli.data.latent_folders import LatentFiles
from sdcli.data.records import ImageSet
from sdcli.data.sources import open_images
from sdcli.encoders.conditioning import ClipReader, TextEncoding
from sdcli.errors import BadOutput, CannotWrite, Interrupted, NotFound, SomeFailed, UsageError
from sdcli.generation.encode_files import encode_files
from sdcli.generation.encode_plan import EncodeSettings
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.images.image_files import open_image
from sdcli.images.pixels import to_pixels
from sdcli.io.lean_diffusers import AutoencoderTiny
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.request.input_files import input_files
from sdcli.request.schema import GenerationRequest
from sdcli.training.settings import cache_folder
from sdcli.vae import autoencoder
from tests.data.cache.filling import Start, begin, filling_processes

SIZE = (32, 32)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


# Set-up


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    """The micro model's VAE and text encoder, in float32."""
    return loaded(tiny_folder)


def loaded(folder: Path, **options: Any) -> LoadedModel:
    spec = load_registry().find(str(folder))
    return load_model(spec, **{"device": "cpu", "dtype": "float32", "parts": ("vae", "text_encoder"), **options})


def sample(path: Path, *, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    """A smooth image unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images."""
    for seed in range(6):
        sample(tmp_path / "data" / f"{seed}.png", seed=seed)
    return tmp_path / "data"


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through the encoder, call by call."""
    calls: list[int] = []
    moments = autoencoder.moments

    def counted(vae: Any, pixels: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(len(pixels))
        return moments(vae, pixels, **options)

    monkeypatch.setattr(autoencoder, "moments", counted)
    return calls


def vae_of(model: LoadedModel) -> CacheVae:
    return CacheVae(model.vae, model.identity("vae"))


def text_encoder_of(model: LoadedModel) -> CacheTextEncoder:
    return cache_text_encoder(model)


def fill(
    images: ImageSet | Path, model: LoadedModel | CacheVae, store: TensorStore, *, digests: bool = False, **options: Any
) -> CacheProgress:
    """Fill the store with a set at 32x32, to the end."""
    if isinstance(images, Path):
        images = open_images(images)
    used = np.arange(len(images))
    if digests:
        options["digests"] = [hashlib.sha256(images.read(int(index))).hexdigest() for index in used]
    vae = vae_of(model) if isinstance(model, LoadedModel) else model
    *_, last = fill_latents(images, used, [SIZE] * len(used), vae=vae, store=store, **options)
    assert last.done == last.total == last.encoded + last.reused + last.dropped
    return last


def read_all(store: TensorStore, index: LatentIndex, *, ways: int = 1) -> list[tuple[Tensor, Tensor | None]]:
    cached = CachedLatents(store, index)
    return [cached[int(item), bool(way)] for item in index.items for way in range(ways)]


def moments_of(model: LoadedModel | CacheVae, *images: Image.Image) -> tuple[Tensor, Tensor | None]:
    """Straight from the VAE, with pixels laid out as diffusers' image processor lays them out."""
    pixels = torch.stack([to_pixels(image) for image in images])
    vae = model.vae if isinstance(model, LoadedModel) else model.network
    return autoencoder.moments(vae, pixels.contiguous(memory_format=torch.channels_last))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# The store


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.dictionaries(
        st.binary(min_size=1, max_size=4),
        st.dictionaries(st.text("abc.é\n", min_size=1, max_size=4), tensors(), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    shard_bytes=st.sampled_from([1, 64, 10**6]),
)
def test_a_record_comes_back_bit_for_bit(
    tmp_path: Path, records: dict[bytes, dict[str, Tensor]], shard_bytes: int
) -> None:
    folder = tmp_path / str(time.monotonic_ns())
    keyed = {hashlib.sha256(name).digest(): record for name, record in records.items()}
    written = TensorStore(folder, "any", shard_bytes=shard_bytes)
    for key, record in keyed.items():
        written.add(key, record)
        assert key in written
    unflushed = {key: written.get(key) for key in keyed}
    written.flush()
    opened = TensorStore(folder, "any")
    numbers = opened.find(np.frombuffer(b"".join(keyed), dtype=np.uint8).reshape(-1, 32))
    held = Records(opened, numbers, budget=10**9)
    assert len(opened) == len(written) == len(keyed)
    assert not opened.damaged
    for number, (key, record) in zip(numbers, keyed.items(), strict=True):
        readings = [unflushed[key], written.get(key), opened.get(key), held[int(number)]]
        readings.append(pickle.loads(pickle.dumps(opened)).read(int(number)))
        for reading in readings:
            assert set(reading) == set(record)
            assert all(same_bits(reading[name], tensor) for name, tensor in record.items())
    shutil.rmtree(folder)


def test_what_is_added_can_be_changed_outside_and_what_is_read_too(tmp_path: Path) -> None:
    store, batch = TensorStore(tmp_path, "any"), torch.arange(6.0).reshape(2, 3)
    store.add(key_of("a"), {"x": batch[0]})
    batch.zero_()
    store.get(key_of("a"))["x"].zero_()
    store.flush()
    number = store.find(np.frombuffer(key_of("a"), dtype=np.uint8)[None])
    for held in (Records(store, number), Records(store, number, budget=10**6)):
        held[int(number[0])]["x"].zero_()
        assert held[int(number[0])]["x"].tolist() == [0, 1, 2]
    (shard,) = (tmp_path / "any").iterdir()
    assert shard.stat().st_size < 1000  # the row alone, not the batch


def test_reading_makes_no_folder_and_finds_nothing_in_a_missing_one(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "absent", "any")
    assert len(store) == 0
    assert key_of("a") not in store
    with pytest.raises(NotFound, match="has no record"):
        store.get(key_of("a"))
    store.flush()
    assert not (tmp_path / "absent").exists()


def test_the_shards_are_ordinary_safetensors_files_of_about_the_size_that_was_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = TensorStore(tmp_path, "any", shard_bytes=4000)
    for number in range(25):
        store.add(key_of(str(number)), {"x": torch.full((100,), float(number))})
    store.flush()
    shards = sorted((tmp_path / "any").iterdir())
    assert len(shards) == 3
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(together) == 25
    assert together[f"{key_of('7').hex()}.x"].eq(7).all()
    umask = os.umask(0)
    os.umask(umask)
    assert all(shard.stat().st_mode & 0o777 == 0o666 & ~umask for shard in shards)


def test_no_shard_has_more_tensors_than_its_reader_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "MAX_TENSORS", 5)
    store = TensorStore(tmp_path, "any")
    for number in range(6):
        store.add(key_of(str(number)), {"a": torch.zeros(1), "b": torch.zeros(1)})
    store.flush()
    assert len(list((tmp_path / "any").iterdir())) == 3
    assert len(TensorStore(tmp_path, "any")) == 6


def test_a_record_waits_no_longer_than_two_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = TensorStore(tmp_path, "any"), [0.0]
    monkeypatch.setattr(cache_store.time, "monotonic", lambda: now[0])
    store.add(key_of("a"), {"x": torch.zeros(1)})
    now[0] = cache_store.FLUSH_SECONDS / 2
    store.add(key_of("b"), {"x": torch.zeros(1)})
    assert len(store) == 0
    now[0] = cache_store.FLUSH_SECONDS + 1
    store.add(key_of("c"), {"x": torch.zeros(1)})
    assert len(store) == 3


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, "any")
    keys = [b"\xff" * 31 + bytes([number]) for number in range(20)] + [b"\0" * 32]
    for number, key in enumerate(keys):
        store.add(key, {"x": torch.tensor(number)})
    store.flush()
    asked = np.frombuffer(b"".join([*keys, b"\xff" * 31 + b"z", b"\0" * 31 + b"z"]), dtype=np.uint8).reshape(-1, 32)
    numbers = store.find(asked)
    assert numbers[-2:].tolist() == [-1, -1]
    assert [store.read(int(number))["x"].item() for number in numbers[:-2]] == list(range(21))


def test_of_two_records_under_one_key_all_readers_take_the_older(tmp_path: Path) -> None:
    first, second = TensorStore(tmp_path, "any"), TensorStore(tmp_path, "any")
    first.add(key_of("a"), {"x": torch.zeros(1)})
    second.add(key_of("a"), {"x": torch.ones(1)})
    first.flush()
    time.sleep(0.02)
    second.flush()
    for _ in range(3):
        assert TensorStore(tmp_path, "any").get(key_of("a"))["x"].item() == 0
    second.add(key_of("b"), {"x": torch.ones(1)})
    second.flush()
    assert key_of("b") not in first
    first.refresh()
    assert first.get(key_of("b"))["x"].item() == 1


def found(store: TensorStore, key: bytes) -> dict[str, Tensor] | None:
    """A record, or None where the store says that it has none, or that it is damaged."""
    try:
        return store.get(key)
    except (NotFound, DamagedCache):
        return None


def test_a_flipped_bit_anywhere_is_never_read_as_data(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "whole", "any")
    contents = {key_of(name): torch.arange(6, dtype=torch.float32) + place for place, name in enumerate("ab")}
    for key, content in contents.items():
        store.add(key, {"x": content})
    store.flush()
    (shard,) = (tmp_path / "whole" / "any").iterdir()
    whole = shard.read_bytes()
    target = tmp_path / "broken" / "any" / shard.name
    target.parent.mkdir(parents=True)
    refused = 0
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        target.write_bytes(broken)
        opened = TensorStore(tmp_path / "broken", "any")
        assert len(opened) in (0, 2)
        assert opened.damaged == ((target,) if not len(opened) else ())
        refused += not len(opened)
        for key, content in contents.items():
            record = found(opened, key)
            assert record is None or torch.equal(record["x"], content)
    assert refused == 8 + int.from_bytes(whole[:8], "little")  # the whole header; in the data, each record on its own


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_passed_over_and_left_alone(tmp_path: Path, length: int) -> None:
    store = TensorStore(tmp_path, "any")
    store.add(key_of("a"), {"x": torch.zeros(50)})
    store.flush()
    (shard,) = (tmp_path / "any").iterdir()
    shard.write_bytes(shard.read_bytes()[:length])
    opened = TensorStore(tmp_path, "any")
    assert opened.damaged == (shard,)
    assert key_of("a") not in opened
    opened.add(key_of("a"), {"x": torch.ones(50)})
    opened.flush()
    assert shard.exists()
    assert TensorStore(tmp_path, "any").get(key_of("a"))["x"].sum() == 50
    with pytest.raises(DamagedCache, match=f"{shard.name}|is damaged|became shorter"):
        store.get(key_of("a"))


def test_foreign_files_among_the_shards_are_passed_over(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "any").mkdir()
    save_file({"weight": torch.zeros(3)}, tmp_path / "any" / "model.safetensors")
    (tmp_path / "any" / "pickle.safetensors").write_bytes(b"\x80\x04" + b"x" * 50)
    (tmp_path / "any" / "folder.safetensors").mkdir()
    (tmp_path / "any" / "note.txt").write_text("hello")
    header = json.dumps({f"{'0' * 64}.x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}).encode()
    raw = struct.pack("<Q", len(header)) + header
    lying = f"{hashlib.sha256(raw).hexdigest()[:16]}-00000000.safetensors"
    (tmp_path / "any" / lying).write_bytes(raw + b"\0" * 8)
    store = TensorStore(tmp_path, "any")
    assert len(store) == 0
    assert len(store.damaged) == 4


def test_a_full_disk_costs_the_shard_in_hand_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(tmp_path, "any")
    store.add(key_of("a"), {"x": torch.zeros(50)})
    store.flush()
    store.add(key_of("b"), {"x": torch.ones(50)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CannotWrite, match="No space left"):
            store.flush()
    assert len(list((tmp_path / "any").iterdir())) == 1
    assert len(TensorStore(tmp_path, "any")) == 1
    store.flush()  # there is room again
    assert len(TensorStore(tmp_path, "any")) == 2


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    old, young = tmp_path / "any" / ".sdcli-1-0.tmp", tmp_path / "any" / ".sdcli-1-1.tmp"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (0, 0))
    store = TensorStore(tmp_path, "any")
    store.add(key_of("a"), {"x": torch.zeros(1)})
    store.flush()
    assert not old.exists()
    assert young.exists()


def test_a_store_with_more_shards_than_it_keeps_open_reads_all_from_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_store, "MAX_OPEN_SHARDS", 5)
    store = TensorStore(tmp_path, "any", shard_bytes=1)
    for number in range(30):
        store.add(key_of(str(number)), {"x": torch.full((500,), number)})
    with TensorStore(tmp_path, "any") as opened, ThreadPoolExecutor(8) as pool:
        asked = [number % 30 for number in range(600)]
        read = pool.map(lambda number: opened.get(key_of(str(number)))["x"], asked)
        assert all(tensor.eq(number).all() for number, tensor in zip(asked, read, strict=True))
        descriptors = {os.readlink(f"/proc/self/fd/{fd}") for fd in opened._files.values()}
        assert len(descriptors) == len(opened._files) <= 5 + 8
    assert not opened._files


def test_a_shard_that_goes_away_or_shrinks_under_a_reader_is_told_in_a_sentence(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, "any")
    store.add(key_of("a"), {"x": torch.zeros(50)})
    store.flush()
    (shard,) = (tmp_path / "any").iterdir()
    os.truncate(shard, 300)
    with pytest.raises(DamagedCache, match="shorter"):
        store.get(key_of("a"))
    store.close()
    shard.unlink()
    with pytest.raises(DamagedCache, match="was deleted while in use"):
        store.get(key_of("a"))


@pytest.mark.slow
def test_thousands_of_records_are_opened_in_seconds_and_take_little_room(tmp_path: Path) -> None:
    import tracemalloc

    store, latents = TensorStore(tmp_path, "any"), torch.randn(4, 4, 4)
    keys = [key_of(str(number)) for number in range(30_000)]
    for key in keys:
        store.add(key, {"mean": latents, "logvar": latents})
    store.flush()
    began = time.perf_counter()
    opened = TensorStore(tmp_path, "any")
    assert time.perf_counter() - began < 2  # 1.3 s for 100,000 on an idle 2-core AMD EPYC
    assert len(pickle.dumps(opened)) < 3.6e6
    tracemalloc.start()
    kept = TensorStore(tmp_path, "any")
    assert tracemalloc.get_traced_memory()[0] < 4.5e6
    tracemalloc.stop()
    assert (kept.find(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)) >= 0).all()
    began = time.perf_counter()
    for number in range(1000):
        opened.read(number * 29)
    assert time.perf_counter() - began < 2


# Moments


def test_moments_are_those_of_diffusers_bit_for_bit(tiny_folder: Path, model: LoadedModel, folder: Path) -> None:
    reference = AutoencoderKL.from_pretrained(tiny_folder / "vae").eval()
    images = [open_image(path) for path in sorted(folder.iterdir())]
    batch = VaeImageProcessor(resample="lanczos").preprocess([resize_and_crop(image, SIZE) for image in images])
    with torch.no_grad():
        expected = reference.encode(batch).latent_dist
    mean, logvar = moments_of(model, *(resize_and_crop(image, SIZE) for image in images))
    assert torch.equal(mean, expected.mean)
    assert logvar is not None
    assert torch.equal(logvar, expected.logvar)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_drawn_from_moments_is_the_distribution_to_the_bit(tiny_folder: Path, dtype: str, tiled: bool) -> None:
    vae = loaded(tiny_folder, dtype=dtype, parts=("vae",)).vae
    pixels = torch.rand((2, 3, 32, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        distribution = vae.encode((pixels * 2 - 1).to(next(vae.parameters()))).latent_dist
        mean, std = distribution.mean.float(), distribution.std.float()
    noise = autoencoder.initial_noise(autoencoder.generators_for([3, 4]), tuple(mean.shape[1:]))
    factor = vae.config.scaling_factor
    moments = autoencoder.moments(vae, pixels, tiled=tiled)
    drawn = autoencoder.draw_latents(vae, moments, autoencoder.generators_for([3, 4]))
    assert torch.equal(autoencoder.draw_latents(vae, moments), mean * factor)
    assert torch.equal(drawn, (mean + std * noise) * factor)


def test_a_draw_is_what_diffusers_draws() -> None:
    moments = torch.randn((1, 8, 4, 4), generator=torch.Generator().manual_seed(1))
    distribution = DiagonalGaussianDistribution(moments)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    expected = distribution.sample(torch.Generator().manual_seed(2)) * 0.18215
    assert torch.equal(sample_latents(distribution.mean, distribution.logvar, noise, 0.18215), expected)
    assert torch.equal(sample_latents(distribution.mean, None, noise, 0.18215), distribution.mean * 0.18215)


# Images


def test_the_cache_holds_what_sdcli_encode_gives_bit_for_bit(
    tmp_path: Path, tiny_folder: Path, folder: Path, model: LoadedModel
) -> None:
    for path in folder.iterdir():  # images of the size itself, so that nothing is resized
        resize_and_crop(open_image(path), SIZE).save(path)
    vae = LoadedVae.load(load_registry().find(str(tiny_folder)), RunSettings(device="cpu"))
    files = input_files([folder], suffixes=frozenset({".png"}), kind="pictures")
    written = list(encode_files(files, vae, EncodeSettings(outdir=tmp_path / "encoded")))
    assert {event.status for event in written} == {"done"}
    store = TensorStore(tmp_path / "cache", "latents")
    index = fill(folder, model, store).latents
    assert index is not None
    cached = CachedLatents(store, index)
    source = open_images(tmp_path / "encoded")
    assert isinstance(source, LatentFiles)
    encoded = EncodedLatents(source)
    assert len(encoded) == len(cached) == 6
    for item in range(6):
        mean, none = encoded[item, False]
        assert none is None
        assert same_bits(cached[item, False][0], mean)
    with pytest.raises(UsageError, match="cannot be mirrored"):
        encoded[0, True]
    check_same_vae(source, identity=model.identity("vae"), model="tiny")
    with pytest.raises(UsageError, match="another VAE"):
        check_same_vae(source, identity="memory", model="tiny")


def test_mirrored_images_are_encoded_mirrored_not_flipped_as_latents(
    tmp_path: Path, folder: Path, model: LoadedModel
) -> None:
    store = TensorStore(tmp_path / "cache", "latents")
    index = fill(folder, model, store, flips=True).latents
    assert index is not None
    assert index.keys.shape == (6, 2, 32)
    cached = CachedLatents(store, index)
    for item, path in enumerate(sorted(folder.iterdir())):
        for way in (False, True):
            mean, logvar = moments_of(model, resize_and_crop(open_image(path), SIZE, flip=way))
            assert logvar is not None
            assert same_bits(cached[item, way][0], mean[0])
            assert same_bits(cached[item, way][1], logvar[0])
        assert not torch.equal(cached[item, True][0], cached[item, False][0].flip(-1))
    assert torch.equal(
        to_pixels(ImageOps.mirror(open_image(path))), to_pixels(open_image(path)).flip(-1)
    )  # what the filling relies on
    plain = fill(folder, model, store).latents
    assert plain is not None
    with pytest.raises(UsageError, match="without mirrored"):
        CachedLatents(store, plain)[0, True]


@pytest.mark.parametrize("digests", [False, True])
def test_a_second_filling_encodes_nothing(
    tmp_path: Path, folder: Path, model: LoadedModel, encodes: list[int], digests: bool
) -> None:
    first = fill(folder, model, TensorStore(tmp_path / "cache", "latents"), flips=True)
    assert (first.encoded, first.reused, sum(encodes)) == (6, 0, 12)
    store = TensorStore(tmp_path / "cache", "latents")
    images: Any = open_images(folder)
    if digests:
        known = [hashlib.sha256(images.read(index)).hexdigest() for index in range(6)]
        unread = type("Unread", (), {"__len__": lambda _: 6, "__getitem__": lambda _, index: images[index]})()
        *_, second = fill_latents(
            unread, range(6), [SIZE] * 6, vae=vae_of(model), store=store, digests=known, flips=True
        )  # such a set cannot even be read
    else:
        second = fill(images, model, store, flips=True)
    assert (second.encoded, second.reused, sum(encodes)) == (0, 6, 12)
    assert first.latents is not None
    assert second.latents is not None
    assert np.array_equal(first.latents.keys, second.latents.keys)
    assert fill(folder, model, store).reused == 6  # those as they are, out of the two ways


def test_one_new_image_costs_one_encode_and_so_does_one_changed_byte(
    tmp_path: Path, folder: Path, model: LoadedModel, encodes: list[int]
) -> None:
    store = TensorStore(tmp_path / "cache", "latents")
    fill(folder, model, store)
    encodes.clear()
    sample(folder / "new.png", seed=99)
    assert fill(folder, model, store).encoded == sum(encodes) == 1
    with open(folder / "0.png", "ab") as file:
        file.write(b"\0")
    assert fill(folder, model, store).encoded == 1
    os.rename(folder / "1.png", folder / "renamed.png")
    shutil.copy(folder / "2.png", folder / "copy.png")
    assert fill(folder, model, store).encoded == 0
    assert sum(encodes) == 2


def test_an_image_that_is_there_twice_is_encoded_once(
    tmp_path: Path, folder: Path, model: LoadedModel, encodes: list[int]
) -> None:
    shutil.copy(folder / "2.png", folder / "copy.png")
    store = TensorStore(tmp_path / "cache", "latents")
    done = fill(folder, model, store, batch_size=4)
    assert (done.encoded, done.reused, sum(encodes)) == (6, 1, 6)
    assert done.latents is not None
    assert len(done.latents.items) == 7


@pytest.mark.slow
def test_everything_that_changes_the_numbers_changes_the_key(tmp_path: Path, tiny_folder: Path) -> None:
    base = loaded(tiny_folder)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_folder, changed)
    weights = changed / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    eps = tmp_path / "eps"
    shutil.copytree(tiny_folder, eps)
    config = json.loads((eps / "vae" / "config.json").read_text())
    (eps / "vae" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 2}))
    scaled = tmp_path / "scaled"
    shutil.copytree(tiny_folder, scaled)
    (scaled / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))

    def keys(model: LoadedModel) -> LatentKeys:
        return LatentKeys.of(vae_of(model))

    plain, digest = Crop(SIZE), hashlib.sha256(b"a").digest()
    key = keys(base).key(digest, plain)
    others = {
        keys(base).key(hashlib.sha256(b"b").digest(), plain),
        keys(base).key(digest, Crop((32, 40))),
        keys(base).key(digest, Crop((40, 32))),
        keys(base).key(digest, Crop(SIZE, at=(0.5, 0.25))),
        keys(base).key(digest, Crop(SIZE, flip=True)),
        keys(loaded(tiny_folder, dtype="bfloat16")).key(digest, plain),
        keys(loaded(changed)).key(digest, plain),
        keys(loaded(eps)).key(digest, plain),
        LatentKeys.of(CacheVae(AutoencoderTiny(), base.identity("vae"))).key(digest, plain),
    }
    assert len({key, *others}) == 10
    assert keys(loaded(tiny_folder)).key(digest, plain) == key
    assert keys(loaded(scaled)).key(digest, plain) == key  # what is stored is not scaled


def test_two_networks_that_were_made_in_memory_never_share_records(model: LoadedModel) -> None:
    one, other = (CacheVae(AutoencoderKL(**model.vae.config).eval(), "memory") for _ in range(2))
    crop, digest = Crop(SIZE), hashlib.sha256(b"a").digest()
    assert LatentKeys.of(one).key(digest, crop) != LatentKeys.of(other).key(digest, crop)
    assert LatentKeys.of(one).key(digest, crop) == LatentKeys.of(one).key(digest, crop)


def test_a_changed_byte_of_the_vae_encodes_everything_anew(
    tmp_path: Path, tiny_folder: Path, folder: Path, model: LoadedModel, encodes: list[int]
) -> None:
    store = TensorStore(tmp_path / "cache", "latents")
    fill(folder, model, store)
    shutil.copytree(tiny_folder, tmp_path / "changed")
    weights = tmp_path / "changed" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert fill(folder, loaded(tmp_path / "changed"), store).encoded == 6
    assert fill(folder, model, store).encoded == 0
    assert sum(encodes) == 12
    assert len(store) == 12


def test_a_damaged_shard_is_told_and_what_it_held_is_encoded_again(
    tmp_path: Path, folder: Path, model: LoadedModel
) -> None:
    store = TensorStore(tmp_path / "cache", "latents", shard_bytes=1)
    index = fill(folder, model, store).latents
    assert index is not None
    expected = read_all(store, index)
    shards = sorted(store.path.iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].write_bytes(b"")
    opened = TensorStore(tmp_path / "cache", "latents")
    images = open_images(folder)
    notes: list[str] = []
    for progress in fill_latents(images, range(6), [SIZE] * 6, vae=vae_of(model), store=opened):
        notes += progress.notes
    assert (progress.encoded, progress.reused) == (2, 4)
    assert [str(shard) in note for shard, note in zip(shards[:2], sorted(notes), strict=True)] == [True, True]
    assert progress.latents is not None
    again = read_all(opened, progress.latents)
    assert all(same_bits(a[0], b[0]) and same_bits(a[1], b[1]) for a, b in zip(expected, again, strict=True))


def test_broken_images_are_dropped_with_a_reason_and_the_others_are_encoded(
    tmp_path: Path, folder: Path, model: LoadedModel
) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "note.png").write_text("hello")
    images = open_images(folder)
    (folder / "5.png").unlink()
    done = fill(images, model, TensorStore(tmp_path / "cache", "latents"))
    assert done.latents is not None
    assert (done.encoded, done.dropped) == (4, 3)
    assert [one.name for one in done.latents.dropped] == ["1.png", "5.png", "note.png"]
    assert all(one.reason and not one.reason.startswith(one.name) for one in done.latents.dropped)
    assert done.latents.items.tolist() == [0, 2, 3, 4]
    cached = CachedLatents(TensorStore(tmp_path / "cache", "latents"), done.latents)
    with pytest.raises(NotFound, match="item 1 has no latents"):
        cached[1, False]


def going_wrong(model: LoadedModel, *, wrong: Callable[[Tensor], Tensor]) -> CacheVae:
    """The model's VAE, whose encoder gives NaN where `wrong` (a value per image of the batch) says so."""
    import copy

    def spoil(_: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.where(wrong(inputs[0])[:, None, None, None], torch.nan, output)

    vae = copy.deepcopy(model.vae)
    vae.encoder.register_forward_hook(spoil)
    return CacheVae(vae, "sha256:spoilt")


def test_latents_that_are_not_finite_are_never_stored(tmp_path: Path, folder: Path, model: LoadedModel) -> None:
    shutil.copy(folder / "3.png", folder / "copy.png")
    third = to_pixels(resize_and_crop(open_image(folder / "3.png"), SIZE)) * 2 - 1
    spoilt = going_wrong(model, wrong=lambda batch: (batch - third).abs().amax(dim=(1, 2, 3)) < 1e-6)
    for batch_size in (1, 4):
        store = TensorStore(tmp_path / f"cache{batch_size}", "latents")
        done = fill(folder, spoilt, store, batch_size=batch_size)
        assert done.latents is not None
        assert done.latents.items.tolist() == [0, 1, 2, 4, 5]
        assert {one.name for one in done.latents.dropped} == {"3.png", "copy.png"}
        assert all("not finite" in one.reason for one in done.latents.dropped)
        assert all(mean.isfinite().all() for mean, _ in read_all(store, done.latents))
        assert len(store) == 5


def test_what_goes_wrong_in_half_precision_is_encoded_in_float32(
    tmp_path: Path, tiny_folder: Path, folder: Path, model: LoadedModel
) -> None:
    half = loaded(tiny_folder, dtype="bfloat16")
    spoilt = going_wrong(half, wrong=lambda batch: torch.full((len(batch),), batch.dtype == torch.bfloat16))
    store = TensorStore(tmp_path / "cache", "latents")
    done = fill(folder, spoilt, store)
    assert done.latents is not None
    assert (done.encoded, done.dropped) == (6, 0)
    image = resize_and_crop(open_image(folder / "0.png"), SIZE)
    exact, _ = moments_of(model, image)
    mean, logvar = CachedLatents(store, done.latents)[0, False]
    assert mean.dtype == torch.bfloat16
    assert logvar is not None
    assert (mean.float() - exact[0]).abs().max() < 0.02 * exact.abs().max()


def test_a_vae_without_a_distribution_stores_the_latent_alone(tmp_path: Path, folder: Path, model: LoadedModel) -> None:
    torch.manual_seed(0)
    tiny = CacheVae(AutoencoderTiny().eval(), "memory")
    store = TensorStore(tmp_path / "cache", "latents")
    index = fill(folder, tiny, store).latents
    assert index is not None
    mean, logvar = CachedLatents(store, index)[0, False]
    assert logvar is None
    assert torch.equal(mean, moments_of(tiny, resize_and_crop(open_image(folder / "0.png"), SIZE))[0][0])


def test_images_of_several_sizes_are_batched_by_size(
    tmp_path: Path, folder: Path, model: LoadedModel, encodes: list[int]
) -> None:
    images, sizes = open_images(folder), [(32, 32), (48, 24), (32, 32), (48, 24), (32, 32), (24, 48)]
    store = TensorStore(tmp_path / "cache", "latents")
    *_, done = fill_latents(images, range(6), np.array(sizes), vae=vae_of(model), store=store, batch_size=2)
    assert sorted(encodes) == [1, 1, 2, 2]
    assert done.latents is not None
    cached = CachedLatents(store, done.latents)
    assert [tuple(cached[item, False][0].shape) for item in range(6)] == [(4, h // 8, w // 8) for w, h in sizes]
    alone = TensorStore(tmp_path / "alone", "latents")
    *_, one_by_one = fill_latents(images, range(6), sizes, vae=vae_of(model), store=alone, batch_size=1)
    assert one_by_one.latents is not None
    for item in range(6):
        assert torch.allclose(
            cached[item, False][0], CachedLatents(alone, one_by_one.latents)[item, False][0], atol=1e-5
        )


def test_what_does_not_fit_into_memory_is_encoded_in_smaller_batches_then_in_tiles(
    tmp_path: Path, folder: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = autoencoder.moments

    def narrow(vae: Any, pixels: Tensor, *, tiled: bool = False) -> tuple[Tensor, Tensor | None]:
        if len(pixels) > 1 or not tiled:
            raise torch.OutOfMemoryError("no room")
        return moments(vae, pixels, tiled=tiled)

    monkeypatch.setattr(autoencoder, "moments", narrow)
    monkeypatch.setattr("sdcli.io.out_of_memory.free_caches", lambda: None)  # slow in a process as large as this
    images, notes = open_images(folder), list[str]()
    store = TensorStore(tmp_path / "cache", "latents")
    for progress in fill_latents(images, range(6), [SIZE] * 6, vae=vae_of(model), store=store, batch_size=4):
        notes += progress.notes
    assert progress.encoded == 6
    assert len(notes) == len(set(notes)) == 3
    assert any("tiles" in note for note in notes)


def test_images_are_read_ahead_of_the_encoder_and_not_without_bound(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(30):
        sample(tmp_path / "data" / f"{seed:02}.png", seed=seed)
    images = open_images(tmp_path / "data")
    read_count, ahead, encoded = [0], threading.Event(), [0]
    lead: list[int] = []

    class Watched:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Any:
            return images[index]

        def read(self, index: int) -> bytes:
            read_count[0] += 1
            lead.append(index - encoded[0])
            if index == 3:
                ahead.set()
            return images.read(index)

    moments = autoencoder.moments

    def waiting(vae: Any, pixels: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        assert ahead.wait(60), "while the first image is encoded, the fourth is not read"
        encoded[0] += 1
        return moments(vae, pixels, **options)

    monkeypatch.setattr(autoencoder, "moments", waiting)
    watched: Any = Watched()
    done = fill(watched, model, TensorStore(tmp_path / "cache", "latents"), workers=3)
    assert done.encoded == read_count[0] == 30
    assert max(lead) <= 3 + 2 + 2


def test_filling_stops_between_batches_and_keeps_what_is_done(tmp_path: Path, folder: Path, model: LoadedModel) -> None:
    store, images = TensorStore(tmp_path / "cache", "latents"), open_images(folder)
    done = [0]

    def stop() -> Interrupted | None:
        return Interrupted("interrupted") if done[0] == 3 else None

    def fill_until_stopped() -> None:
        for progress in fill_latents(images, range(6), [SIZE] * 6, vae=vae_of(model), store=store, stop=stop):
            done[0] = progress.encoded

    with pytest.raises(Interrupted):
        fill_until_stopped()
    assert len(TensorStore(tmp_path / "cache", "latents")) == 3
    left = fill_latents(images, range(6), [SIZE] * 6, vae=vae_of(model), store=store)
    assert any(progress.encoded for progress in left)
    left.close()  # a caller that walks away
    assert len(TensorStore(tmp_path / "cache", "latents")) == 4
    assert threading.active_count() < 20


def test_the_data_are_never_touched(tmp_path: Path, folder: Path, model: LoadedModel) -> None:
    def snapshot() -> dict[str, tuple[bytes, int]]:
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}

    (folder / "broken.png").write_text("no image")
    before, folder_time = snapshot(), folder.stat().st_mtime_ns
    fill(folder, model, TensorStore(tmp_path / "cache", "latents"), flips=True)
    assert snapshot() == before
    assert folder.stat().st_mtime_ns == folder_time


# Reading at training time


class Items(torch.utils.data.Dataset[tuple[Tensor, Tensor | None]]):
    def __init__(self, cached: CachedLatents) -> None:
        self.cached = cached

    def __len__(self) -> int:
        return 2 * len(self.cached)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor | None]:
        return self.cached[int(self.cached.items[number // 2]), bool(number % 2)]


@pytest.mark.parametrize("budget", [0, 10**9])
def test_worker_processes_and_copies_read_the_same(
    tmp_path: Path, folder: Path, model: LoadedModel, budget: int
) -> None:
    store = TensorStore(tmp_path / "cache", "latents", shard_bytes=3000)
    index = fill(folder, model, store, flips=True).latents
    assert index is not None
    items = Items(CachedLatents(store, index, budget=budget))
    assert items.cached.held == (budget > 0)
    expected = [items[number] for number in range(12)]
    copied: Items = pickle.loads(pickle.dumps(items))
    loader = DataLoader(items, batch_size=None, num_workers=2)
    for other in ([copied[number] for number in range(12)], list(loader)):
        assert all(same_bits(a[0], b[0]) and same_bits(a[1], b[1]) for a, b in zip(expected, other, strict=True))


def test_latents_are_held_only_where_they_fit_the_budget(tmp_path: Path, folder: Path, model: LoadedModel) -> None:
    store = TensorStore(tmp_path / "cache", "latents")
    index = fill(folder, model, store).latents
    assert index is not None
    need = 6 * 2 * 4 * 4 * 4 * 4
    assert not CachedLatents(store, index, budget=need - 1).held
    cached = CachedLatents(store, index, budget=need)
    assert cached.held
    shutil.rmtree(store.path)
    assert cached[5, False][0].isfinite().all()
    with pytest.raises(NotFound, match="lacks the latents of 6 of 6 images"):
        CachedLatents(TensorStore(tmp_path / "cache", "latents"), index)


# Texts

CAPTIONS = ["", "a red fox", "eine Füchsin, 狐", "x " * 200, "two\nlines", "a red fox"]


@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_cached_text_is_what_generate_computes_bit_for_bit(tmp_path: Path, model: LoadedModel, budget: int) -> None:
    readers = [ClipReader(model.tokenizer, model.text_encoder)]
    store, encoding = TensorStore(tmp_path, "texts"), TextEncoding("tiny", readers)
    *_, done = fill_texts(CAPTIONS, encoder=text_encoder_of(model), store=store)
    assert (done.total, done.encoded) == (5, 5)
    *_, again = fill_texts([*CAPTIONS, "new"], encoder=text_encoder_of(model), store=TensorStore(tmp_path, "texts"))
    assert (again.encoded, again.reused) == (1, 5)
    texts = CachedTexts(TensorStore(tmp_path, "texts"), TextKeys.of(text_encoder_of(model)), CAPTIONS, budget=budget)
    assert texts.held == (budget > 0)
    for text in CAPTIONS:
        request = resolve(GenerationRequest(prompt=text, prompt_syntax="plain"), model.spec)
        expected = encoding([request], guided=False, steps=request.passes[0]).at(1).inputs["encoder_hidden_states"][0]
        assert same_bits(texts[text]["hidden"], expected)
        assert same_bits(pickle.loads(pickle.dumps(texts))[text]["hidden"], expected)
    with pytest.raises(NotFound, match="'absent'"):
        texts["absent"]
    with pytest.raises(NotFound, match="lacks 1 of 2 texts, first 'absent'"):
        CachedTexts(store, TextKeys.of(text_encoder_of(model)), ["", "absent"])


@pytest.mark.slow
def test_another_text_encoder_or_tokenizer_means_other_keys(tmp_path: Path, tiny_folder: Path) -> None:
    def changed(name: str, change: Callable[[Path], None]) -> bytes:
        shutil.copytree(tiny_folder, tmp_path / name)
        change(tmp_path / name)
        return TextKeys.of(text_encoder_of(loaded(tmp_path / name))).key("a fox")

    def flip_a_weight(folder: Path) -> None:
        data = bytearray((folder / "text_encoder" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "text_encoder" / "model.safetensors").write_bytes(data)

    def other_activation(folder: Path) -> None:
        config = json.loads((folder / "text_encoder" / "config.json").read_text())
        (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))

    def shorter(folder: Path) -> None:
        config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 40}))

    def one_merge_less(folder: Path) -> None:
        data = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
        data["model"]["merges"].pop()
        (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(data))

    base = TextKeys.of(text_encoder_of(loaded(tiny_folder)))
    changes = {"weight": flip_a_weight, "act": other_activation, "short": shorter, "merge": one_merge_less}
    keys = {
        base.key("a fox"),
        base.key("a fox "),
        TextKeys.of(text_encoder_of(loaded(tiny_folder, dtype="bfloat16"))).key("a fox"),
        *(changed(name, change) for name, change in changes.items()),
    }
    assert len(keys) == 7
    assert TextKeys.of(text_encoder_of(loaded(tiny_folder))).key("a fox") == base.key("a fox")


def test_a_text_encoder_that_gives_nan_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    broken = loaded(tiny_folder)
    with torch.no_grad():
        broken.text_encoder.final_layer_norm.weight.fill_(torch.nan)
    store = TensorStore(tmp_path, "texts")
    with pytest.raises(BadOutput, match="text encoder"):
        list(fill_texts(["a"], encoder=text_encoder_of(broken), store=store))
    assert len(store) == 0


# Processes


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path) -> Iterator[Start]:
    with filling_processes(tiny_folder, tmp_path) as processes:
        yield processes


def wait_for_shards(folder: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(folder.glob("latents/*.safetensors"))) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


def check_against_an_undisturbed_filling(tmp_path: Path, model: LoadedModel, index: LatentIndex | None) -> None:
    """Every record of the cache is bit for bit what a filling at one go gives."""
    alone = TensorStore(tmp_path / "alone", "latents")
    expected = fill(tmp_path / "data", model, alone).latents
    assert index is not None
    assert expected is not None
    pairs = zip(read_all(TensorStore(tmp_path / "cache", "latents"), index), read_all(alone, expected), strict=True)
    assert all(same_bits(a[0], b[0]) and same_bits(a[1], b[1]) for a, b in pairs)


@pytest.mark.slow
def test_of_two_fillings_of_one_folder_that_are_killed_all_that_was_written_is_used(
    tmp_path: Path, model: LoadedModel, start: Start, encodes: list[int]
) -> None:
    for seed in range(24):
        sample(tmp_path / "data" / f"{seed:02}.png", seed=seed)
    processes = [start(pause=0.1), start(pause=0.15)]
    begin(*processes)
    wait_for_shards(tmp_path / "cache", 4)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    store = TensorStore(tmp_path / "cache", "latents")
    assert not store.damaged
    keys = {bytes(key) for key in store._index.keys}
    assert 0 < len(keys) < 24
    done = fill(tmp_path / "data", model, store)
    assert (done.encoded, done.reused) == (24 - len(keys), len(keys))
    assert sum(encodes) == 24 - len(keys)
    check_against_an_undisturbed_filling(tmp_path, model, done.latents)


@pytest.mark.slow
def test_two_processes_that_fill_one_folder_at_once_leave_the_union(
    tmp_path: Path, model: LoadedModel, start: Start
) -> None:
    for seed in range(24):
        sample(tmp_path / "data" / f"{seed:02}.png", seed=seed)
    processes = [start(pause=0.05), start(pause=0.06)]
    begin(*processes)  # when both are ready: the first could be done before the other has started
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.split()[-1] == "24"
    store = TensorStore(tmp_path / "cache", "latents")
    assert not store.damaged
    assert len(store) > 24  # they did overlap, and both their records are there
    done = fill(tmp_path / "data", model, store)
    assert (done.encoded, done.reused) == (0, 24)
    check_against_an_undisturbed_filling(tmp_path, model, done.latents)


@pytest.mark.slow
def test_a_filling_that_is_killed_over_and_over_comes_to_its_end(
    tmp_path: Path, model: LoadedModel, start: Start
) -> None:
    for seed in range(24):
        sample(tmp_path / "data" / f"{seed:02}.png", seed=seed)
    for turn in range(5):
        process = start(pause=0.005)
        begin(process)
        wait_for_shards(tmp_path / "cache", turn + 1)
        time.sleep(0.004 * turn)  # another moment each time, in the midst of a write too
        process.kill()
        process.wait()
        assert not TensorStore(tmp_path / "cache", "latents").damaged
    done = fill(tmp_path / "data", model, TensorStore(tmp_path / "cache", "latents"))
    assert done.done == done.encoded + done.reused == 24
    check_against_an_undisturbed_filling(tmp_path, model, done.latents)


# The command


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`sdcli dataset cache`, in this process."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(dataset_cache.command)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_command_fills_both_caches_and_says_what_it_did(
    tmp_path: Path, folder: Path, tiny_folder: Path, cache: Callable[..., Any]
) -> None:
    for seed in range(6):
        (folder / f"{seed}.txt").write_text(f"fox {seed}\nanimal")
    arguments = (folder, "-m", tiny_folder, "--resolution", "32", "--random-flip", "--cache-dir", tmp_path / "cache")
    result = cache(*arguments)
    assert result.exception is None, result.exception
    assert "pictures: 6 encoded, 0 reused, 0 dropped" in result.stdout
    assert "% of the time spent waiting for data" in result.stdout
    assert "texts: 8 encoded" in result.stdout  # six, "animal" and the empty one
    (row,) = [json.loads(line) for line in cache(*arguments, "--json").stdout.splitlines()]
    assert row["latents"]["reused"] == 6
    assert row["texts"] == {**row["texts"], "encoded": 0, "reused": 8}
    assert row["cache_bytes"] > 0
    assert len(TensorStore(tmp_path / "cache", "latents")) == 12
    model = loaded(tiny_folder)
    texts = CachedTexts(
        TensorStore(tmp_path / "cache", "texts"), TextKeys.of(text_encoder_of(model)), ["", "fox 3", "animal"]
    )
    assert texts["animal"]["hidden"].shape == (77, 32)


def test_the_command_ends_with_7_where_images_were_dropped(
    tmp_path: Path, folder: Path, tiny_folder: Path, cache: Callable[..., Any]
) -> None:
    (folder / "broken.png").write_text("hello")
    result = cache(folder, "-m", tiny_folder, "--resolution", "32", "--cache-dir", tmp_path / "cache", "--json")
    assert isinstance(result.exception, SomeFailed)
    assert result.exception.exit_code == 7
    assert json.loads(result.stdout)["dropped"] == 1
    assert len(TensorStore(tmp_path / "cache", "latents")) == 6


def test_the_command_refuses_what_makes_no_sense(
    tmp_path: Path, folder: Path, tiny_folder: Path, cache: Callable[..., Any]
) -> None:
    refused = {
        ("--cache-dir", folder / "cache"): "which is never changed",
        ("--resolution", "33"): "multiple of 8",
        ("--min-bucket-reso", "16"): "--enable-bucket",
    }
    for arguments, sentence in refused.items():
        result = cache(folder, "-m", tiny_folder, *arguments)
        assert isinstance(result.exception, UsageError)
        assert sentence in str(result.exception)
    assert cache_folder().parts[-2:] == ("sdcli", "training")
    assert not (folder / "cache").exists()
