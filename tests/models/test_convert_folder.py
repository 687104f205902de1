"""Folders with pickled weights: the advice that refuses them is followed to its end, and then they are models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from sdcli.errors import BadWeights, CannotWrite, NotFound, UsageError
from sdcli.models.adapter_files import find_lora
from sdcli.models.convert_folder import convert_folder, present_name
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from tests.conftest import Run


def sharded(folder: Path, stem: str, state: dict[str, torch.Tensor], *, index: str) -> None:
    """Two pickled shards and their index, as diffusers and transformers write them."""
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"{stem}-0000{number}-of-00002.bin" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        torch.save({name: state[name] for name in half}, folder / file)
    place = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))


@pytest.fixture
def pickled(tmp_path: Path, tiny_folder: Path) -> Path:
    """A diffusers folder: shards of the UNet and the text encoder, one file of the VAE, all pickles."""
    folder = tmp_path / "a model"
    shutil.copytree(tiny_folder, folder)
    for part, stem, index in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin.index.json"),
        ("text_encoder", "pytorch_model", "pytorch_model.bin.index.json"),
        ("vae", "diffusion_pytorch_model", ""),
    ):
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        file.unlink()
        if index:
            sharded(folder / part, stem, state, index=index)
        else:
            torch.save(state, folder / part / f"{stem}.bin")
    return folder


def advised(sentence: str) -> list[str]:
    """The command that a sentence gives, without `sdcli`."""
    match = re.search(r"sdcli (models convert .+)$", sentence)
    assert match is not None, sentence
    return shlex.split(match[1])


@pytest.mark.slow
def test_the_advice_for_a_model_of_pickled_shards_leads_to_a_model_in_one_step(
    pickled: Path, tiny_folder: Path, sdcli: Run
) -> None:
    with pytest.raises(BadWeights, match="is a pickle") as refused:
        load_model(load_registry().find(str(pickled)), device="cpu")
    done = sdcli(*advised(str(refused.value)))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    ours = load_model(spec_of_folder(pickled), device="cpu", dtype="float32")
    theirs = load_model(spec_of_folder(tiny_folder), device="cpu", dtype="float32")
    for part, network in theirs.parts.items():
        found = ours.parts[part].state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in network.state_dict().items())
    transformers = CLIPTextModel.from_pretrained(pickled / "text_encoder", use_safetensors=True)
    assert transformers.num_parameters() == sum(p.numel() for p in ours.text_encoder.parameters())


@pytest.mark.slow
def test_a_new_folder_gets_the_other_files_and_no_pickles(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model_index.json").write_text("{}")
    with pytest.raises(CannotWrite, match="exists already"):
        convert_folder(pickled, tmp_path / "new", overwrite=False)
    convert_folder(pickled, tmp_path / "new", overwrite=True)
    files = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith(".bin") or ".bin." in name]
    assert "text_encoder/model.safetensors.index.json" in files
    assert "tokenizer/tokenizer.json" in files
    load_model(spec_of_folder(tmp_path / "new"), device="cpu")


@pytest.mark.slow
def test_a_folder_with_some_weights_in_both_formats_keeps_those(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.bin")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    done = convert_folder(tmp_path, tmp_path, overwrite=False)
    assert [one.file.name for one in done] == ["other.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_converted_is_told_before_anything_is_read(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no pickled weights"):
        convert_folder(tmp_path / "empty", tmp_path / "empty", overwrite=False)
    with pytest.raises(NotFound):
        convert_folder(tmp_path / "nothing", tmp_path / "x", overwrite=False)
    with pytest.raises(UsageError, match="is a file"):
        convert_folder(pickled, pickled / "model_index.json", overwrite=False)
    (pickled / "unet" / "diffusion_pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(BadWeights, match="has no weight_map"):
        convert_folder(pickled, pickled, overwrite=False)
    assert not list(pickled.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_advice_for_a_pickled_peft_folder_leads_to_a_lora(tmp_path: Path, sdcli: Run) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="is a pickle") as refused:
        find_lora(str(folder), None)
    assert sdcli(*advised(str(refused.value))).returncode == 0
    assert find_lora(str(folder), None) == folder


@pytest.mark.slow
def test_the_advice_for_an_a1111_embedding_leads_to_one_tensor(tmp_path: Path, sdcli: Run) -> None:
    """The layout that the web UI saves: the vectors by `*`, in a dictionary of their own."""
    from sdcli.io.pickles import pickle_refused

    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "ink", "step": 500}
    content |= {"sd_checkpoint": "abc", "sd_checkpoint_name": "tiny"}
    torch.save(content, tmp_path / "ink.pt")
    assert sdcli(*advised(pickle_refused(tmp_path / "ink.pt"))).returncode == 0
    (found,) = load_file(tmp_path / "ink.safetensors").values()
    assert torch.equal(found, vectors)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.bin", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("v1-5.ckpt", "v1-5.safetensors"),
    ],
)
def test_safetensors_have_the_names_that_loaders_look_for(name: str, expected: str) -> None:
    assert present_name(name) == expected
