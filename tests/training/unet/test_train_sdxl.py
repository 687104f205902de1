"""`sdcli train-unet` of SDXL: two text encoders and the sizes of images as conditions; diffusers is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn import functional

from sdcli.data.buckets import Bucketing, resize_and_crop
from sdcli.data.cache.store import TensorStore
from sdcli.encoders.caption_encoder import token_ids
from sdcli.encoders.tokenizer import load_tokenizer
from sdcli.errors import BadWeights, UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.io import rng
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.models.sources import RandomSource
from sdcli.request.schema import GenerationRequest
from sdcli.training.config_files import settings_from
from sdcli.training.inputs.captions import CaptionRules
from sdcli.training.inputs.sources import WithSizes, flipped
from sdcli.training.model_parts import ModelFiles, text_parts, write_part
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.task import Draw
from sdcli.training.unet.session import UnetSession
from sdcli.training.unet.settings import UnetSettings
from tests.conftest import Run
from tests.oracle import load_pipeline
from tests.tiny import save_tiny_pipeline, save_tiny_sdxl
from tests.training.ranks import together, training
from tests.training.test_sharding import check_parity, per_process
from tests.training_runs import QUICK, captioned_images, fresh_accelerator, same_checkpoint, train_unet

SIZES = ((64, 64), (100, 60), (50, 90))
FEW: dict[str, Any] = {"validation_split": 0.0, "sample_steps": 1, "sample_prompts": ("a picture",), "resolution": "64"}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return captioned_images(tmp_path / "pictures", sizes=SIZES)


def loaded(folder: Path) -> LoadedModel:
    return load_model(spec_of_folder(folder), device="cpu", dtype="float32")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


# Conditions


@pytest.mark.parametrize("zeros", [True, False])
def test_captions_are_encoded_as_generate_encodes_them(tmp_path: Path, zeros: bool) -> None:
    pipeline = load_pipeline(save_tiny_sdxl(tmp_path / "model", zeros_for_empty=zeros))
    encoder = pipeline.model.family.caption_encoder(pipeline.model)
    captions = ["a cat", "", "(a) [b], " + "long " * 100]
    with torch.inference_mode():
        found = encoder(torch.stack([token_ids(encoder.tokenizers, caption) for caption in captions]))
    for place, caption in enumerate(captions):
        fields = {"prompt_syntax": "plain", "width": 64, "height": 64, "guidance_scale": 5.0, "steps": 4}
        one = GenerationRequest(prompt=caption or "x", negative_prompt="" if not caption else None, **fields)
        inputs = pipeline.encode([resolve(one, pipeline.model.spec)], guided=True, steps=4).at(1).inputs
        row = 1 if caption else 0  # an empty caption stands for the empty negative prompt
        assert torch.allclose(found["hidden"][place], inputs["encoder_hidden_states"][row], atol=1e-5)
        assert torch.allclose(found["pooled"][place], inputs["text_embeds"][row], atol=1e-5)
    assert zeros == (not found["hidden"][1].any())
    assert zeros == (not found["pooled"][1].any())


class Nothing:
    """A source of nothing."""

    def item(self, draw: Draw) -> dict[str, torch.Tensor]:
        return {}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {}


SIDES = st.integers(8, 60)


@given(original=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES), counter=st.integers(0, 2**40))
@settings(max_examples=100)
def test_time_ids_say_where_the_sample_was_cut_from(
    original: tuple[int, int], size: tuple[int, int], counter: int
) -> None:
    """Cutting the resized image there, mirrored as a whole if the sample is, gives the sample's pixels."""
    bucketing = Bucketing((size,), random_crop=True)
    sizes = WithSizes(Nothing(), torch.tensor([original]).numpy(), bucketing, 3, flip=True)
    height, width, top, left, down, across = map(int, sizes.item(Draw(counter, 0, size))["time_ids"])
    assert ((width, height), (across, down)) == (original, size)

    image = Image.effect_noise(original, 90).convert("RGB")
    at, mirrored = bucketing.crop_position(rng.scalars(3, counter, "crop")), flipped(3, counter)
    sample = resize_and_crop(image, size, at=at, flip=mirrored)
    scale = max(across / width, down / height)
    covering = (max(across, round(width * scale)), max(down, round(height * scale)))
    whole = image if covering == image.size else image.resize(covering, Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if mirrored else whole
    assert sample.tobytes() == whole.crop((left, top, left + across, top + down)).tobytes()


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_loss_is_diffusers_own(tmp_path: Path, sdxl: Path, data: Path, cached: bool) -> None:
    """The steps of diffusers' train_text_to_image_sdxl.py, on the same noise, timesteps, captions and crops."""
    changes = {"enable_bucket": True, "caption_dropout": 0.3, "random_crop": not cached, "shuffle_caption": not cached}
    fresh_accelerator()
    values = {**QUICK, **FEW, **changes, "model": str(sdxl), "cache_dir": tmp_path / "cache", "train_batch_size": 2}
    with UnetSession(str(data), tmp_path / "run", settings_from(UnetSettings, values), load_registry()) as session:
        list(session.prepare(resume=False))
        task: Any = session.setup.task
        batches = [[(draw, task.item(draw)) for draw in task.draws(step)] for step in range(4)]
        ours = [
            task.losses(task.networks, task.collate([item for _, item in batch]), weighted=False).detach()
            for batch in batches
        ]
    oracle = StableDiffusionXLPipeline.from_pretrained(sdxl)
    scheduler = DDPMScheduler.from_config(oracle.scheduler.config)
    rules: CaptionRules = task.conditioning.rules
    for batch, losses in zip(batches, ours, strict=True):
        for (draw, item), loss in zip(batch, losses, strict=True):
            caption = rules.text(task.conditioning.images[draw.index].captions, seed=0, counter=draw.counter)
            hidden, no_hidden, pooled, no_pooled = oracle.encode_prompt(caption or "x", device="cpu")
            hidden, pooled = (hidden, pooled) if caption else (no_hidden, no_pooled)
            x0 = item["x0"] if cached else task._encoded(item["pixels"][None], item["posterior"][None])[0]
            width, height = SIZES[draw.index % len(SIZES)]
            target = (draw.size[1], draw.size[0])
            place = tuple(int(number) for number in item["time_ids"][2:4])
            times = oracle._get_add_time_ids((height, width), place, target, torch.float32, 24)
            with torch.no_grad():
                noised = scheduler.add_noise(x0[None], item["noise"][None], item["t"][None])
                added = {"text_embeds": pooled, "time_ids": times}
                output = oracle.unet(noised, item["t"][None], hidden, added_cond_kwargs=added).sample
            assert float(loss) == pytest.approx(float(functional.mse_loss(output, item["noise"][None])), rel=1e-4)


# Runs


@pytest.mark.slow
def test_the_run_is_a_model_folder_of_diffusers_and_of_sdcli(
    tmp_path: Path, sdxl: Path, data: Path, sdcli: Run
) -> None:
    run = tmp_path / "run"
    train_unet(data, run, model=str(sdxl), max_train_steps=2, use_ema=True, sample_every_n_steps=2, **FEW)
    assert (run / "samples" / "step-2.png").is_file()
    base, trained = weights(sdxl), weights(run / "raw")
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in base.items())
    loaded = StableDiffusionXLPipeline.from_pretrained(run)
    assert (loaded.tokenizer.pad_token, loaded.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    states = StableDiffusionXLPipeline.from_pretrained(sdxl).encode_prompt("a cat", device="cpu")
    assert all(torch.equal(*pair) for pair in zip(loaded.encode_prompt("a cat", device="cpu"), states, strict=True))
    done = sdcli("generate", "a cat", "-m", run, "--steps", "2", "-o", "cat.png", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["width"] == 64


def test_the_run_keeps_what_the_family_reads_of_the_base_and_names_no_part_that_it_lacks(
    tmp_path: Path, tiny_folder: Path
) -> None:
    xl = ModelFiles.around(loaded(save_tiny_sdxl(tmp_path / "xl", zeros_for_empty=False)), trained={}, averaged=())
    xl.write(tmp_path / "run-xl")
    assert json.loads((tmp_path / "run-xl/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False

    folder = shutil.copytree(tiny_folder, tmp_path / "checked")
    index = json.loads((folder / "model_index.json").read_text())
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps({**index, **named}))
    ModelFiles.around(loaded(folder), trained={}, averaged=()).write(tmp_path / "run")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "run").safety_checker is None


@pytest.mark.slow
def test_a_tokenizer_without_a_folder_pads_as_its_model_does(tmp_path: Path) -> None:
    """OpenCLIP's pads with "!", which changes the states of every caption."""
    spec = ModelSpec(name="x", source=RandomSource(kind="random", architecture="tiny-sdxl"), family="sdxl")
    model = load_model(spec, device="cpu", dtype="float32")
    for part in text_parts(model):
        write_part(tmp_path / part, model, part)
    for part, tokenizer in model.tokenizers.items():
        written = load_tokenizer(tmp_path / part.replace("text_encoder", "tokenizer"))
        assert written("a fox").ids == tokenizer("a fox").ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"use_ema": True, "enable_bucket": True, "random_flip": True},
        {"rank": 2, "random_crop": True, "shuffle_caption": True, "mixed_precision": "bf16"},
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, sdxl: Path, data: Path, changes: dict[str, Any]
) -> None:
    given = {**FEW, **changes, "model": str(sdxl)}
    train_unet(data, tmp_path / "one", max_train_steps=4, checkpointing_steps=2, **given)
    train_unet(data, tmp_path / "two", max_train_steps=2, **given)
    train_unet(data, tmp_path / "two", max_train_steps=4, resume=True, **given)
    assert same_checkpoint(
        newest_checkpoint(tmp_path / "one").path,
        newest_checkpoint(tmp_path / "two").path,
    )


@pytest.mark.slow
def test_both_files_of_a_lora_give_diffusers_the_merged_network(tmp_path: Path, sdxl: Path, data: Path) -> None:
    run = tmp_path / "run"
    train_unet(data, run, model=str(sdxl), max_train_steps=3, rank=2, lora_alpha=4.0, learning_rate=1e-2, **FEW)
    merged, base = weights(run), weights(sdxl)
    changed = [name for name in base if not torch.allclose(base[name], merged[name], atol=1e-7)]
    assert changed
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
        pipeline.load_lora_weights(run / "current", weight_name=file)
        pipeline.fuse_lora()
        fused = {name.replace(".base_layer", ""): one for name, one in pipeline.unet.state_dict().items()}
        for name in changed:
            assert torch.allclose(fused[name], merged[name], atol=1e-5), (file, name)
    kohya = load_file(run / "current" / "lora_kohya.safetensors")
    assert all(name.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for name in kohya)


@pytest.mark.slow
def test_dataset_cache_fills_what_the_training_reads(tmp_path: Path, sdxl: Path, data: Path, sdcli: Run) -> None:
    cache = tmp_path / "cache"
    filled = sdcli(
        "dataset", "cache", data, "-m", sdxl, "--cache-dir", cache, "--resolution", "64", "--dtype", "float32"
    )
    assert filled.returncode == 0, filled.stderr
    before = [len(TensorStore(cache, kind)) for kind in ("latents", "texts")]
    assert before == [6, 13]
    train_unet(data, tmp_path / "run", model=str(sdxl), max_train_steps=1, cache_dir=cache, **FEW)
    assert [len(TensorStore(cache, kind)) for kind in ("latents", "texts")] == before


@pytest.mark.slow
def test_two_processes_with_sharded_weights_train_as_one(tmp_path: Path, sdxl: Path) -> None:
    data = captioned_images(tmp_path / "pictures", 8)
    changes = {**FEW, "model": str(sdxl), "max_train_steps": 3, "optimizer": "sgd", "learning_rate": 0.05}
    together(2, training, tmp_path, str(data), str(tmp_path / "two"), per_process(changes, 2))
    train_unet(data, tmp_path / "one", train_batch_size=4, **changes)
    check_parity(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("save", [save_tiny_sdxl, save_tiny_pipeline])
def test_a_unet_for_other_text_encoders_is_refused(tmp_path: Path, data: Path, save: Callable[..., Path]) -> None:
    other = save(tmp_path / "model", cross_attention_dim=24)
    with pytest.raises(BadWeights, match="its UNet takes text states of 24 numbers, and those of"):
        train_unet(data, tmp_path / "run", model=str(other))


def test_what_is_not_trained_is_refused(tmp_path: Path, sdxl: Path, data: Path) -> None:
    with pytest.raises(UsageError, match="has two text encoders, which train-unet does not train"):
        train_unet(data, tmp_path / "run", model=str(sdxl), train_text_encoder=True)
    with pytest.raises(UsageError, match="SDXL's kind of UNet is only fine-tuned"):
        train_unet(data, tmp_path / "run", from_scratch=str(sdxl / "unet"))
