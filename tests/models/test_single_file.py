"""Single files of SD 2.x and SDXL: the same models as their diffusers folders, told apart by their names alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli.errors import BadWeights
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.families import SD1, SD2, SDXL
from sdcli.models.families import family as family_configs
from sdcli.models.families.family import Family
from sdcli.models.families.sdxl import ZEROS
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.networks import build_empty, network_class
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.models.sources import FileSource
from sdcli.request.schema import GenerationRequest
from tests.ldm import ldm_checkpoint, sd2_checkpoint, sdxl_checkpoint
from tests.tiny import save_tiny_pipeline, save_tiny_sdxl

XL = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "vae_layers": 2,
}
REFINER = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "vae_layers": 2,
    "refiner": True,
    "zeros_for_empty": False,
}
SD2_MICRO = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": True,
    "hidden_act": "gelu",
    "vae_layers": 2,
}
MICROS: dict[
    str, tuple[Callable[..., Path], dict[str, Any], Callable[..., dict[str, torch.Tensor]], tuple[str, ...]]
] = {
    "sd2": (save_tiny_pipeline, SD2_MICRO, sd2_checkpoint, ("unet", "vae", "text_encoder")),
    "sdxl": (save_tiny_sdxl, XL, sdxl_checkpoint, ("unet", "vae", "text_encoder_2", "text_encoder")),
    "refiner": (save_tiny_sdxl, REFINER, sdxl_checkpoint, ("unet", "vae", "text_encoder_2")),
}


def load(file: Path) -> LoadedModel:
    spec = ModelSpec(name=file.name, source=FileSource(kind="file", path=file))
    return load_model(spec, dtype="float32", device="cpu")


@pytest.fixture(scope="module", params=MICROS)
def micro(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A micro model as a diffusers folder and as a single file."""
    save, changes, checkpoint, parts = MICROS[request.param]
    folder = save(tmp_path_factory.mktemp("single") / request.param, **changes)
    model = load_model(spec_of_folder(folder), dtype="float32", device="cpu")
    file = folder.with_suffix(".safetensors")
    save_file(checkpoint(*(model.parts[part].state_dict() for part in parts)), file)
    return request.param, folder, file


@pytest.fixture
def shipped(micro: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files take the shipped configurations; here they are the micro model's."""
    _, folder, _ = micro
    configs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/*config.json")}
    monkeypatch.setattr(family_configs, "shipped_configs", lambda name: configs)


@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_a_single_file_is_the_same_model_as_its_diffusers_folder(micro: tuple[str, Path, Path]) -> None:
    name, folder, file = micro
    ours, theirs = load(file), load_model(spec_of_folder(folder), dtype="float32", device="cpu")
    assert ours.parts.keys() == theirs.parts.keys()
    for part, network in theirs.parts.items():
        expected, found = network.state_dict(), ours.parts[part].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert ours.settings.get(ZEROS, True) == theirs.settings.get(ZEROS, True)
    if name != "sd2":
        ids = [model.tokenizers["text_encoder_2"]("a cat").ids for model in (ours, theirs)]
        assert ids[0] == ids[1]


@pytest.mark.usefixtures("shipped")
def test_each_missing_part_is_named(micro: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, _, file = micro
    tensors = load_file(file)
    for start, part in (("first_stage_model.", "VAE"), ("model.diffusion_model.", "UNet")):
        save_file({key: t for key, t in tensors.items() if not key.startswith(start)}, tmp_path / "part.safetensors")
        with pytest.raises(BadWeights, match=f"has no {part} .* is not a whole SD"):
            load(tmp_path / "part.safetensors")
    few = {key: t for key, t in tensors.items() if "resblocks.1." not in key}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(BadWeights, match="lacks"):
        load(tmp_path / "few.safetensors")
    if name == "sdxl":
        one = {key: t for key, t in tensors.items() if not key.startswith("conditioner.embedders.1.")}
        save_file(one, tmp_path / "one.safetensors")
        with pytest.raises(BadWeights, match="has no second text encoder"):
            load(tmp_path / "one.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_v_prediction_is_read_off_the_file(micro: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, _, file = micro
    tensors = load_file(file)
    assert load(file).scheduler_config.get("prediction_type", "epsilon") == "epsilon"
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    marks = {bias: torch.linspace(-1, 1, 32)} if name == "sd2" else {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}
    save_file({**tensors, **marks}, tmp_path / "v.safetensors")
    config = load(tmp_path / "v.safetensors").scheduler_config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] == (name != "sd2")


def test_a_file_brings_the_size_that_its_family_likes(micro: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, _, file = micro
    spec = load_registry().find(str(file))
    assert spec.family.name == ("sd2" if name == "sd2" else "sdxl")
    assert resolve(GenerationRequest(prompt="x"), spec).width == (512 if name == "sd2" else 1024)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:100])
    assert load_registry().find(str(damaged)).family.name == "sd1", "loading it reports what is wrong"


@pytest.mark.parametrize(
    ("family", "number", "sizes"),
    [
        (SD1, 0, {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}),
        (SD2, 0, {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863}),
        (
            SDXL,
            1,
            {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 2_567_463_684, "vae": 83_653_863},
        ),
        (SDXL, 0, {"text_encoder_2": 694_659_840, "unet": 2_259_526_660, "vae": 83_653_863}),
    ],
)
def test_the_shipped_configurations_are_those_of_the_published_models(
    family: Family, number: int, sizes: dict[str, int]
) -> None:
    layout = family.single_files[number]
    configs = layout.configs()
    _, components = family.components()
    found = {}
    for part in layout.prefixes:
        kind = network_class(configs[part], components[part], family)
        network = build_empty(kind, configs[part], source=layout.title)
        found[part] = sum(p.numel() for p in network.parameters())
    assert found == sizes


@pytest.mark.slow
def test_a_single_file_of_nine_channels_is_loaded_as_an_inpainting_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped configuration has four channels; the header says how many there are."""
    changes = {**SD2_MICRO, "in_channels": 9, "use_linear_projection": False, "hidden_act": "quick_gelu"}
    folder = save_tiny_pipeline(tmp_path / "nine", **changes)
    theirs = load_model(spec_of_folder(folder), dtype="float32", device="cpu")
    parts = (theirs.parts[part].state_dict() for part in ("unet", "vae", "text_encoder"))
    save_file(ldm_checkpoint(*parts), tmp_path / "nine.safetensors")
    configs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/*config.json")}
    configs["unet"]["in_channels"] = 4
    monkeypatch.setattr(family_configs, "shipped_configs", lambda name: configs)
    ours = load(tmp_path / "nine.safetensors")
    assert ours.spec.kind.inpaints
    assert ours.spec.kind == theirs.spec.kind
    expected, found = theirs.unet.state_dict(), ours.unet.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
