"""Latent files: what ComfyUI's own formula makes of ours, what we make of ComfyUI's, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdcli.errors import BadLatents, NotFound, SdcliError, UsageError
from sdcli.vae.latent_files import latent_bytes, read_latents, read_record
from sdcli.vae.latent_record import LatentRecord, Source

LATENTS = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 5


def record(count: int = 2, **changes: object) -> LatentRecord:
    sources = tuple(
        Source(
            name=f"{k} ä.png", sha256="0" * 64, width=50, height=41, fitted_width=48, fitted_height=40, fit="crop"
        )
        for k in range(count)
    )  # fmt: skip
    fields = {"model": "tiny", "vae": "random:tiny:0", "scaling_factor": 0.5, "sample": "mean", "source": sources}
    return LatentRecord.model_validate({**fields, **changes})


def ours(folder: Path, latents: torch.Tensor = LATENTS, **changes: object) -> Path:
    path = folder / "ours.safetensors"
    path.write_bytes(latent_bytes(latents, record(len(latents), **changes)))
    return path


def as_comfyui_loads(path: Path) -> torch.Tensor:
    """The lines of ComfyUI's LoadLatent."""
    latent = load_file(path, device="cpu")
    multiplier = 1.0
    if "latent_format_version_0" not in latent:
        multiplier = 1.0 / 0.18215
    return latent["latent_tensor"].float() * multiplier


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    read = read_latents(ours(tmp_path))
    assert torch.equal(read.latents, LATENTS)
    assert read.record == record() == read_record(tmp_path / "ours.safetensors")
    assert not read.scaled
    assert torch.equal(read.unscaled(0.123), LATENTS)


def test_comfyui_reads_the_vaes_own_latents_from_our_files(tmp_path: Path) -> None:
    assert torch.equal(as_comfyui_loads(ours(tmp_path)), LATENTS)
    assert torch.equal(as_comfyui_loads(ours(tmp_path, LATENTS.half(), stored="float16")), LATENTS.half().float())


def test_any_reader_finds_the_record_as_json_in_the_header(tmp_path: Path) -> None:
    with safe_open(ours(tmp_path), framework="pt") as file:
        found = json.loads(file.metadata()["sdcli"])
    assert found["schema"] == 1
    assert found["kind"] == "latents"
    assert (found["model"], found["vae"], found["scaling_factor"]) == ("tiny", "random:tiny:0", 0.5)
    assert found["scaled"] is False
    assert found["source"][1]["name"] == "1 ä.png"
    assert found["source"][1]["fitted_width"] == 48


def test_equal_latents_give_equal_bytes(tmp_path: Path) -> None:
    assert latent_bytes(LATENTS, record()) == latent_bytes(LATENTS.clone(), record())


@pytest.mark.parametrize("marked", [True, False])
def test_comfyuis_own_files_are_read_as_comfyui_reads_them(tmp_path: Path, marked: bool) -> None:
    tensors = {"latent_tensor": LATENTS} | ({"latent_format_version_0": torch.tensor([])} if marked else {})
    save_file(tensors, tmp_path / "a.latent", metadata={"prompt": json.dumps({"1": {"class_type": "x"}})})
    read = read_latents(tmp_path / "a.latent")
    assert torch.equal(read.latents, as_comfyui_loads(tmp_path / "a.latent"))
    assert not read.scaled
    assert read.record is None


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_plain_files_are_what_the_caller_says(tmp_path: Path, name: str, scaled: bool) -> None:
    if name == "a.npy":
        np.save(tmp_path / name, LATENTS[0].numpy().astype(np.float64))
    else:
        save_file({"anything": LATENTS[0].contiguous()}, tmp_path / name)
    with pytest.raises(UsageError, match="--scaled or --unscaled"):
        read_latents(tmp_path / name)
    read = read_latents(tmp_path / name, scaled=scaled)
    assert torch.equal(read.latents, LATENTS[:1])
    assert torch.equal(read.unscaled(0.25), LATENTS[:1] / 0.25 if scaled else LATENTS[:1])


def test_a_file_that_speaks_for_itself_is_not_overruled(tmp_path: Path) -> None:
    assert torch.equal(read_latents(ours(tmp_path), scaled=False).latents, LATENTS)
    with pytest.raises(UsageError, match="records that its latents are unscaled"):
        read_latents(tmp_path / "ours.safetensors", scaled=True)
    scaled = read_latents(ours(tmp_path, scaled=True))
    assert torch.equal(scaled.unscaled(0.1), LATENTS / 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    latents = LATENTS.clone()
    latents[1, 2, 3, 4] = bad
    with pytest.raises(BadLatents, match="NaN or infinite"):
        read_latents(ours(tmp_path, latents))


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("canary"),)


def test_pickles_are_refused_in_every_disguise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"latent_tensor": Bomb()}, tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.pt").read_bytes())
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "objects.npy", np.array([Bomb(), None], dtype=object), allow_pickle=True)
    paths = sorted(tmp_path.glob("*.*"))
    assert len(paths) == 5
    for path in paths:
        with pytest.raises(BadLatents, match=r"is a pickle, which can run any|holds pickled objects"):
            read_latents(path, scaled=True)
    assert not (tmp_path / "canary").exists()


def test_other_things_are_refused_in_a_sentence_each(tmp_path: Path) -> None:
    def refused(name: str, match: str, kind: type[SdcliError] = BadLatents) -> None:
        with pytest.raises(kind, match=match):
            read_latents(tmp_path / name, scaled=True)

    refused("absent.safetensors", "no file", NotFound)
    (tmp_path / "folder.safetensors").mkdir()
    refused("folder.safetensors", "not a regular file")
    (tmp_path / "text.safetensors").write_text("hello, this is no latent file")
    refused("text.safetensors", "not a safetensors file")
    (tmp_path / "text.npy").write_text("hello, this is no numpy array")
    refused("text.npy", "not a numpy array")
    np.save(tmp_path / "whole.npy", np.zeros((4, 8, 8), dtype=np.int32))
    refused("whole.npy", "not floating-point")
    np.save(tmp_path / "flat.npy", np.zeros((8, 8), dtype=np.float32))
    refused("flat.npy", r"shape 8x8; latents are \[C, h, w\]")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 8, 8), dtype=np.float32))
    refused("none.npy", "shape 0x4x8x8")
    save_file({"a": LATENTS, "b": LATENTS + 1}, tmp_path / "two.safetensors")
    refused("two.safetensors", "holds 2 tensors")
    save_file({"a": torch.zeros(4, 8, 8, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    refused("whole.safetensors", "not floating-point")
    save_file({"latent_tensor": LATENTS}, tmp_path / "newer.safetensors", metadata={"sdcli": '{"schema": 2}'})
    refused("newer.safetensors", "newer sdcli")
    for text in ("[]", "nonsense", "[" * 100_000, '{"schema": 1, "model": 3}', '{"schema": 1, "surprise": true}'):
        save_file({"latent_tensor": LATENTS}, tmp_path / "damaged.safetensors", metadata={"sdcli": text})
        refused("damaged.safetensors", "record is damaged")


def test_an_array_that_announces_terabytes_is_refused_before_they_are_reserved(tmp_path: Path) -> None:
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 4, 1000, 1000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))
    with pytest.raises(BadLatents, match="cut short"):
        read_latents(tmp_path / "a.npy", scaled=True)


@pytest.mark.parametrize("name", ["ours.safetensors", "a.npy"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    ours(tmp_path)
    np.save(tmp_path / "a.npy", LATENTS.numpy())
    data = (tmp_path / name).read_bytes()
    for end in [*range(0, 200, 7), *range(200, len(data), 101), len(data) - 1]:
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(BadLatents):
            read_latents(tmp_path / name, scaled=None if name.startswith("ours") else True)


@settings(max_examples=150)
@given(st.data())
def test_a_file_with_flipped_bytes_is_read_or_refused_but_never_breaks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    whole = bytearray(ours(folder).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / "ours.safetensors").write_bytes(whole)
    try:
        read = read_latents(folder / "ours.safetensors")
    except SdcliError:
        return
    assert read.latents.isfinite().all()
