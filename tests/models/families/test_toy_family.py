"""The recipe of CONTRIBUTING.md is true: a family is one file and one row of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdcli.cli.app import app
from sdcli.models.families import FAMILIES
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, load_registry
from sdcli.models.sources import RandomSource
from tests.models.families.toy import TOY, pack, unpack
from tests.training_runs import captioned_images, train_unet


@pytest.fixture(autouse=True)
def toy_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, TOY.name, TOY)


@pytest.fixture
def toy_file(tmp_path: Path) -> Path:
    """A single file of the family, with random weights."""
    spec = ModelSpec(name="random-toy", source=RandomSource(kind="random", architecture="toy"))
    model = load_model(spec, device="cpu", dtype="float32")
    prefixes = TOY.single_files[0].prefixes
    tensors = {
        f"{prefixes[part]}{name}": tensor.clone()
        for part, network in model.parts.items()
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def generated(model: Path, out: Path, *arguments: str) -> np.ndarray:
    """The pixels of an image that the command generates."""
    fixed = ["generate", "-m", str(model), "--seed", "1", "--device", "cpu", "--dtype", "float32", "-o", str(out)]
    done = CliRunner().invoke(app, [*fixed, *arguments, "a cat"])
    assert done.exit_code == 0, done.output
    return np.asarray(Image.open(out))


def test_packing_is_undone() -> None:
    x = torch.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8)
    assert pack(x).shape == (2, 12, 16)
    assert torch.equal(unpack(pack(x), 6, 8), x)


def test_it_loads_from_a_single_file_and_generates(toy_file: Path, tmp_path: Path) -> None:
    spec = load_registry().find(str(toy_file))
    assert (spec.family, spec.kind.size_step, spec.defaults.scheduler) == (TOY, 16, "flow-euler")
    image = generated(toy_file, tmp_path / "a.png")
    assert image.shape == (64, 64, 3)
    other = generated(toy_file, tmp_path / "b.png", "--negative-prompt", "a dog", "--size", "96x64")
    assert other.shape == (64, 96, 3)
    refused = CliRunner().invoke(app, ["generate", "-m", str(toy_file), "--scheduler", "ddim", "a cat"])
    assert "which was trained with flow matching" in str(refused.exception)


@pytest.mark.slow
def test_it_trains_a_lora_that_generates(toy_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = captioned_images(tmp_path / "data")
    train_unet(data, run, model=str(toy_file), max_train_steps=3, rank=2, learning_rate=0.05, resolution="64")
    (lora,) = run.rglob("lora_kohya.safetensors")
    assert any(name.startswith("lora_unet_blocks_0_to_q") for name in load_file(lora))
    before = generated(toy_file, tmp_path / "before.png")
    merged, added = (
        generated(run, tmp_path / "run.png"),
        generated(toy_file, tmp_path / "lora.png", "--lora", str(lora)),
    )
    assert (merged != before).any()
    assert np.abs(merged.astype(int) - added.astype(int)).max() <= 2
    (peft,) = run.rglob("pytorch_lora_weights.safetensors")
    assert (generated(toy_file, tmp_path / "peft.png", "--lora", str(peft)) == added).all()
