"""Loading: every source gives the same networks, and every kind of damage its own sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.io.weight_files import check_header
from sdcli.models.families import family as family_configs
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.models.sources import FileSource, FolderSource
from sdcli.request.schema import GenerationRequest
from tests.conftest import REPOSITORY
from tests.ldm import ldm_checkpoint
from tests.tiny import save_tiny_pipeline

MICRO_UNET = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
"""The structure of SD 1.5 in miniature."""


def load(source: Path) -> LoadedModel:
    if source.is_dir():
        return load_model(spec_of_folder(source), dtype="float32", device="cpu")
    spec = ModelSpec(name=source.name, source=FileSource(kind="file", path=source))
    return load_model(spec, dtype="float32", device="cpu")


def states(model: LoadedModel) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": t for part, network in model.parts.items() for name, t in network.state_dict().items()}


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One micro SD 1.x model, as a diffusers folder and as a single file with LDM keys."""
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("micro") / "micro-sd", vae_layers=2, **MICRO_UNET)
    model = load(folder)
    file = folder.parent / "micro-sd.safetensors"
    save_file(ldm_checkpoint(*(model.parts[part].state_dict() for part in ("unet", "vae", "text_encoder"))), file)
    return folder, file


@pytest.fixture
def micro_configs(micro: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files take the shipped SD 1.5 configuration; here it is that of the micro model."""
    folder, _ = micro
    configs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/*config.json")}
    monkeypatch.setattr(family_configs, "shipped_configs", lambda folder: configs)


@pytest.mark.usefixtures("micro_configs")
def test_a_single_file_with_ldm_keys_is_the_same_model_as_its_diffusers_folder(micro: tuple[Path, Path]) -> None:
    folder, file = (load(source) for source in micro)
    expected, found = states(folder), states(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    latents = []
    for model in (folder, file):
        request = GenerationRequest(prompt="a cat", seed=1, width=64, height=64, steps=2)
        *_, last = sample(Pipeline.of(model), [resolve(request, model.spec)])
        latents.append(last.latents)
    assert torch.equal(*latents)


@pytest.mark.slow
def test_old_spellings_of_vae_attention_and_text_model_are_read(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "old")
    expected = states(load(tmp_path / "old"))
    vae = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new, old in olds.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae)
    text = tmp_path / "old" / "text_encoder" / "model.safetensors"
    renamed = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(text).items()}
    save_file({**renamed, "text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    found = states(load(tmp_path / "old"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_shards_and_variants_are_the_same_model(tmp_path: Path, tiny_folder: Path) -> None:
    expected = states(load(tiny_folder))
    shutil.copytree(tiny_folder, tmp_path / "sharded")
    whole = tmp_path / "sharded" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    halves = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, whole.parent / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    vae = tmp_path / "sharded" / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = states(load(tmp_path / "sharded"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def damaged(tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None]) -> SdcliError:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises(SdcliError) as caught:
        load(folder)
    return caught.value


UNET = "unet/diffusion_pytorch_model.safetensors"


def _truncate(folder: Path) -> None:
    os.truncate(folder / UNET, (folder / UNET).stat().st_size - 100)


def _cut_header(folder: Path) -> None:
    os.truncate(folder / UNET, 100)


def _empty(folder: Path) -> None:
    (folder / UNET).write_bytes(b"")


def _pickle_in_disguise(folder: Path) -> None:
    torch.save({"x": torch.zeros(1)}, folder / UNET)


def _pickle(folder: Path) -> None:
    (folder / UNET).unlink()
    torch.save({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(tmp_path: Path, length: int) -> None:
    """80 02 to 80 05, with which pickles begin, are also the lowest bytes of these lengths."""
    entry = '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    data = length.to_bytes(8, "little") + (entry + " " * (length - len(entry) - 1) + "}").encode() + bytes(4)
    (tmp_path / "x.safetensors").write_bytes(data)
    assert set(check_header(tmp_path / "x.safetensors")) == {"x"}


def _garbage(folder: Path) -> None:
    (folder / UNET).write_bytes(b"\x10\0\0\0\0\0\0\0" + b"this is not json" * 4)


def _missing_key(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / UNET)


def _extra_key(folder: Path) -> None:
    save_file({**load_file(folder / UNET), "../../etc/passwd": torch.zeros(1)}, folder / UNET)


def _wrong_shape(folder: Path) -> None:
    save_file({**load_file(folder / UNET), "conv_in.bias": torch.zeros(7)}, folder / UNET)


def _too_many(folder: Path) -> None:
    header = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(30_000)}
    raw = json.dumps(header).encode()
    (folder / UNET).write_bytes(len(raw).to_bytes(8, "little") + raw)


def _huge_header(folder: Path) -> None:
    (folder / UNET).write_bytes((2**40).to_bytes(8, "little") + b"{}")


def _lying_offsets(folder: Path) -> None:
    raw = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / UNET).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)


def _other_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


def _evil_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"]}))


def _no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def _bad_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text('{"block_out_channels": "many"}')


def _no_config(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()


def _nested_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "kind", "sentence"),
    [
        (_truncate, BadWeights, "cut short"),
        (_cut_header, BadWeights, "cut short"),
        (_empty, BadWeights, "not a safetensors file"),
        (_pickle_in_disguise, BadWeights, "sdcli models convert"),
        (_pickle, BadWeights, "sdcli models convert"),
        (_garbage, BadWeights, "not JSON"),
        (_missing_key, BadWeights, "lacks 1 of"),
        (_extra_key, BadWeights, "has no place for"),
        (_wrong_shape, BadWeights, "has shape 7, its configuration asks for 32"),
        (_too_many, BadWeights, "30,000 tensors"),
        (_huge_header, BadWeights, "not a safetensors file"),
        (_lying_offsets, BadWeights, "damaged"),
        (_other_pipeline, UsageError, "FluxPipeline"),
        (_evil_class, BadWeights, "'system'"),
        (_no_tokenizer, BadWeights, "no tokenizer folder"),
        (_bad_config, BadWeights, "describes no network"),
        (_no_config, NotFound, "config.json"),
        (_nested_config, BadWeights, "cannot be read"),
    ],
)
def test_each_damage_gets_its_own_sentence(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None], kind: type[SdcliError], sentence: str
) -> None:
    error = damaged(tiny_folder, tmp_path, damage)
    assert type(error) is kind
    assert sentence in str(error)
    assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_down.lora_down.weight": torch.zeros(1)}, "is a LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "one part of a diffusers model"),
        ({"model.diffusion_model.x": torch.zeros(1), "edm_mean": torch.zeros(1)}, "noise levels of EDM"),
        ({"model.diffusion_model.x": torch.zeros(1)}, "without its VAE or text encoder"),
        ({"whatever": torch.zeros(1)}, "has no UNet"),
    ],
)
def test_files_that_people_take_for_checkpoints_are_told_apart(
    tmp_path: Path, tensors: dict[str, torch.Tensor], sentence: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SdcliError, match=sentence):
        load(tmp_path / "x.safetensors")


def test_a_part_alone_can_be_loaded(tiny_folder: Path) -> None:
    model = load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu", parts=("vae",))
    assert list(model.weights()) == ["vae"]
    with pytest.raises(AttributeError, match="was not loaded"):
        _ = model.unet


def test_identities_are_the_digests_of_the_files(tiny_folder: Path) -> None:
    import hashlib

    digest = hashlib.sha256((tiny_folder / UNET).read_bytes()).hexdigest()
    assert load(tiny_folder).identity("unet") == f"sha256:{digest}"
    assert load_model(load_registry().find("tiny"), device="cpu").identity("unet") == "random:tiny:0"


@pytest.mark.slow
def test_random_weights_are_the_same_every_time_and_differ_by_seed() -> None:
    tiny = load_registry().models["tiny"]
    first, second = (states(load_model(tiny, device="cpu")) for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other = tiny.model_copy(update={"source": tiny.source.model_copy(update={"seed": 1})})
    changed = states(load_model(other, device="cpu"))
    assert not torch.equal(first["unet.conv_in.weight"], changed["unet.conv_in.weight"])
    assert all(tensor.isfinite().all() for tensor in first.values())


LEAN = """
import sys, torch
from sdcli.models.loader import load_model
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.registry import load_registry
from sdcli.request.schema import GenerationRequest
heavy = {name for name in ("transformers", "torch._dynamo", "scipy") if sys.modules.get(name) is not None}
assert not heavy, heavy
spec = load_registry().find("tiny")
pipeline = Pipeline.of(load_model(spec, device="cpu"))
for scheduler in ("dpmpp-2m", "lms"):
    *_, step = sample(pipeline, [resolve(GenerationRequest(prompt="x", seed=1, steps=2, scheduler=scheduler), spec)])
    assert sys.modules.get("transformers") is None
torch.save(step.latents, sys.argv[1])
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # the real ones come after all
from transformers import CLIPTextModel
assert isinstance(pipeline.model.unet, UNet2DConditionModel)
assert "FromSingleFileMixin" in {base.__name__ for base in StableDiffusionPipeline.__mro__}
"""


@pytest.mark.slow
def test_lean_imports_leave_out_what_is_slow_and_change_no_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", LEAN, str(tmp_path / "latents.pt")], env=environment, check=True)
    spec = load_registry().find("tiny")
    pipeline = Pipeline.of(load_model(spec, device="cpu"))
    *_, step = sample(pipeline, [resolve(GenerationRequest(prompt="x", seed=1, steps=2, scheduler="lms"), spec)])
    assert torch.equal(torch.load(tmp_path / "latents.pt", weights_only=True), step.latents)


@pytest.mark.slow
def test_a_folder_of_the_sd2_kind_is_painted_as_diffusers_does(tmp_path: Path) -> None:
    """Another activation, a padding token of its own, linear projections: what sets SD 2.x apart."""
    from diffusers import StableDiffusionPipeline

    folder = save_tiny_pipeline(
        tmp_path / "sd2", hidden_act="gelu", use_linear_projection=True, attention_head_dim=(4, 8)
    )
    model = load(folder)
    assert isinstance(model.spec.source, FolderSource)
    request = GenerationRequest(
        prompt="a cat",
        negative_prompt="blurry",
        seed=3,
        width=64,
        height=64,
        steps=3,
        guidance_scale=6,
        scheduler="ddim",
    )
    *_, last = sample(Pipeline.of(model), [resolve(request, model.spec)])
    reference = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    from sdcli.diffusion.scheduler_factory import make_scheduler

    reference.scheduler = make_scheduler("ddim", model.scheduler_config)
    expected = reference(
        "a cat",
        negative_prompt="blurry",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    assert torch.equal(last.latents, expected)


@pytest.mark.slow
def test_a_full_size_model_loads_in_half_precision_without_a_second_copy(tmp_path: Path) -> None:
    """random-sd15 at 128x128 in bfloat16: peak memory at most the weights + 1.2 GB, the UNet being 1.7."""
    script = (
        "import resource, sys\n"
        "sys.argv = ['sdcli', 'generate', 'x', '-m', 'random-sd15', '--steps', '1', '--size', '128x128',"
        " '--dtype', 'bfloat16', '-q', '-o', sys.argv[1]]\n"
        "from sdcli.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.png")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    peak = int(output.splitlines()[-1])
    weights = 2 * (859_520_964 + 83_653_863 + 123_060_480)
    assert peak - weights <= 1.2e9
