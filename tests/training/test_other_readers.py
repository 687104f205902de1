"""What a run writes is read by tools of any age: names of weights, tokenizer files, and the strength of a LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli.encoders.clip import ClipTextEncoder
from sdcli.encoders.tokenizer import load_tokenizer
from sdcli.models.families import SD1
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.lora import with_loras
from sdcli.models.registry import spec_of_folder
from sdcli.request.fields import LoraRef
from sdcli.training.lora import LoraShape, add_lora, write_lora
from sdcli.training.model_parts import write_part
from sdcli.training.state.training_state import TrainingState
from sdcli.training.text_encoder.network import write_text_encoder
from tests.training.read_with_diffusers import FILES, noisy
from tests.training_runs import captioned_images, train_unet

OLD = [
    *("diffusers==0.31.0", "transformers==4.46.3", "huggingface_hub==0.26.5", "tokenizers==0.20.3"),
    *("peft==0.13.2", "accelerate==1.1.1", "requests", "urllib3"),
]
SCRIPT = Path(__file__).with_name("read_with_diffusers.py")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(spec_of_folder(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lora(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA files of a UNet and a text encoder with alpha 4 at rank 2, and random weights."""
    folder = tmp_path_factory.mktemp("lora")
    parts = load_model(spec_of_folder(tiny_folder), device="cpu", dtype="float32").parts
    shapes = {
        "unet": LoraShape(2, 4.0, ("to_q", "to_v", "to_out.0")),
        "text_encoder": LoraShape(2, 4.0, ("q_proj", "v_proj")),
    }
    generator = torch.Generator().manual_seed(0)
    for part, shape in shapes.items():
        add_lora(parts[part], shape, seed=0)
        for name, parameter in parts[part].named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    write_lora(folder, {part: parts[part] for part in shapes}, shapes, SD1)
    return folder


def with_file(model: LoadedModel, file: Path) -> LoadedModel:
    return with_loras(model, (LoraRef(path=str(file)),), folder=None)


# LoRA files


def test_text_encoder_layers_have_the_prefix_that_older_transformers_needs(lora: Path) -> None:
    diffusers, kohya = (load_file(lora / file) for file in FILES.values())
    text = [name for name in diffusers if name.startswith("text_encoder.")]
    assert text
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in text)
    assert all("_te_text_model_encoder_" in name for name in kohya if name.startswith("lora_te"))


def test_a_lora_in_diffusers_dialect_is_as_strong_without_its_metadata(lora: Path, model: LoadedModel) -> None:
    diffusers, kohya = (load_file(lora / file) for file in FILES.values())
    layers = [name.removesuffix(".lora_B.weight") for name in diffusers if name.endswith(".lora_B.weight")]
    for layer in layers:
        theirs = layer.replace("text_encoder.", "lora_te.").replace("unet.", "lora_unet.").replace(".", "_")
        full = kohya[f"{theirs}.alpha"] / 2 * kohya[f"{theirs}.lora_up.weight"] @ kohya[f"{theirs}.lora_down.weight"]
        plain = diffusers[f"{layer}.lora_B.weight"] @ diffusers[f"{layer}.lora_A.weight"]
        assert torch.allclose(plain, full, rtol=1e-5, atol=1e-6), layer
    with_both = [with_file(model, lora / file) for file in FILES.values()]
    for part in ("unet", "text_encoder"):
        weights = [dict(one.parts[part].named_parameters()) for one in with_both]
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_a_lora_file_of_an_earlier_version_has_the_strength_that_its_metadata_gives(
    lora: Path, model: LoadedModel, tmp_path: Path
) -> None:
    """It had plain weights, alpha in the metadata alone, and no prefix before the text encoder's layers."""
    now = load_file(lora / FILES["diffusers"])
    before = {
        name.replace("text_encoder.text_model.", "text_encoder."): tensor / 2 if ".lora_B." in name else tensor
        for name, tensor in now.items()
    }
    facts = {
        f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in (("r", 2), ("lora_alpha", 4))
    }
    save_file(before, tmp_path / "old.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    old, new = with_file(model, tmp_path / "old.safetensors"), with_file(model, lora / FILES["diffusers"])
    for part in ("unet", "text_encoder"):
        for name, weight in new.parts[part].named_parameters():
            assert torch.equal(weight, old.parts[part].get_parameter(name)), name


# Folders


def test_a_trained_text_encoder_has_the_prefix_and_a_resume_reads_it_with_and_without(
    tmp_path: Path, model: LoadedModel
) -> None:
    network = model.text_encoder
    names = frozenset(name for name, _ in network.named_parameters())
    state = TrainingState({"text_encoder": network}, {}, {"text_encoder": names}, {}, {})
    write_text_encoder(tmp_path / "text_encoder", network, network.state_dict())
    file = tmp_path / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    assert all(name.startswith("text_model.") for name in stored)
    state.save(tmp_path, done=1)
    assert not (tmp_path / "state").exists(), "the weights are saved once"
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for spelling in (stored, {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}):
        save_file(spelling, file)
        other = ClipTextEncoder(network.config)
        restored = TrainingState({"text_encoder": other}, {}, {"text_encoder": names}, {}, {})
        assert restored.restore(tmp_path) == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_frozen_parts_get_the_names_and_the_files_that_older_tools_need(
    tmp_path: Path, tiny_folder: Path, model: LoadedModel
) -> None:
    for part in ("text_encoder", "tokenizer"):
        write_part(tmp_path / part, model, part)
    theirs = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    ours = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in ours)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    assert {name.removeprefix("text_model.") for name in ours} == plain.keys()
    assert all(torch.equal(tensor, plain[name.removeprefix("text_model.")]) for name, tensor in ours.items())
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    by_files, by_json = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(tiny_folder / "tokenizer")
    for text in ("a red fox", "l'été à la plage !!", "日本", "<|endoftext|>x", ""):
        assert by_files(text) == by_json(text)


# The tools themselves


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with diffusers 0.31 and transformers 4.46, and the torch of this one."""
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    (site,) = folder.glob("lib/python*/site-packages")
    packages = Path(torch.__file__).parent.parent
    (site / "zz_torch.pth").write_text(f"import sys; sys.path.append({str(packages)!r})\n")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", *OLD]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "no reason given")
        pytest.skip(f"diffusers 0.31 and transformers 4.46 cannot be installed: {reason[:200]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("age", ["old", "present"])
def test_diffusers_reads_a_run_and_its_lora_files_with_the_trained_strength(
    tmp_path: Path, tiny_folder: Path, age: str, request: pytest.FixtureRequest
) -> None:
    python = request.getfixturevalue("old_python") if age == "old" else sys.executable
    images = captioned_images(tmp_path / "images", 2)
    trained: dict[str, Any] = {"max_train_steps": 2, "learning_rate": 1e-2, "model": str(tiny_folder)}
    train_unet(images, tmp_path / "plain", **{**trained, "max_train_steps": 1, "learning_rate": 1e-12})
    train_unet(images, tmp_path / "lora", rank=2, lora_alpha=4.0, train_text_encoder=True, **trained)
    command = [python, str(SCRIPT), str(tmp_path / "plain"), str(tmp_path / "lora"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "out.safetensors")
    base = load_model(spec_of_folder(tmp_path / "plain"), device="cpu", dtype="float32")
    assert base.tokenizer is not None
    ids = torch.tensor([base.tokenizer("a red fox").ids])
    for name in ("plain", *FILES):
        model = base if name == "plain" else with_file(base, tmp_path / "lora" / "current" / FILES[name])
        with torch.no_grad():
            states = model.text_encoder(ids)
            output = model.unet(noisy(), torch.tensor([500]), states)[0]
        assert torch.allclose(found[f"{name}.text"], states, atol=1e-4), name
        assert torch.allclose(found[f"{name}.unet"], output, atol=1e-4), name
    for part in ("text", "unet"):
        assert (found[f"diffusers.{part}"] - found[f"plain.{part}"]).abs().max() > 1e-2
