"""SDXL: diffusers' StableDiffusionXLPipeline is the oracle, its Img2Img reference that of the refiner."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import BadWeights, SdcliError, UsageError
from sdcli.generation.events import Result
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.images.pixels import from_pixels
from sdcli.io.weights import random_tensors
from sdcli.metadata.embed import parameters_text
from sdcli.metadata.read import read_image
from sdcli.models.families import SD1, SDXL
from sdcli.models.folder import from_folder
from sdcli.models.loader import load_model
from sdcli.models.lora import with_loras
from sdcli.models.networks import NETWORKS, build_empty
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.models.sources import RandomSource
from sdcli.request.fields import LoraRef
from sdcli.request.jobs import Line
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import GenerationRequest, parse_request
from sdcli.training.model_parts import load_to_train
from tests.hub_server import cached
from tests.loras import random_pairs, save_diffusers, save_kohya
from tests.oracle import TWO, UNGUIDED, comparable, latents, load_pipeline, reference_latents, reference_of
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.service import cache_of, generate_files, pipeline_of
from tests.tiny import save_tiny_sdxl

SMALL = {"width": 64, "height": 96, "steps": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sdxl")
    return {
        "base": save_tiny_sdxl(root / "base"),
        "refiner": save_tiny_sdxl(root / "refiner", refiner=True, zeros_for_empty=False),
    }


@pytest.fixture(scope="module")
def base(folders: dict[str, Path]) -> StableDiffusionXLPipeline:
    return reference_of(StableDiffusionXLPipeline, folders["base"])


@pytest.fixture(scope="module")
def refiner(folders: dict[str, Path]) -> StableDiffusionXLImg2ImgPipeline:
    return reference_of(StableDiffusionXLImg2ImgPipeline, folders["refiner"])


@pytest.fixture(scope="module")
def pipeline(folders: dict[str, Path]) -> Pipeline:
    base, refiner = (
        load_model(spec_of_folder(folders[name]), dtype="float32", device="cpu") for name in ("base", "refiner")
    )
    return Pipeline.of(base, refiner=refiner)


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
def test_latents_equal_diffusers_bit_for_bit_with_every_scheduler(
    pipeline: Pipeline, base: StableDiffusionXLPipeline, scheduler: str
) -> None:
    fields = {**SMALL, "guidance_scale": 7.5, "scheduler": scheduler}
    expected = reference_latents(base, config=pipeline.model.scheduler_config, **fields)
    assert torch.equal(latents(without_refiner(pipeline), **fields), expected)


def without_refiner(pipeline: Pipeline) -> Pipeline:
    return Pipeline.of(pipeline.model)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_without_guidance_turbo_equals_diffusers(
    pipeline: Pipeline, base: StableDiffusionXLPipeline, guidance_scale: float
) -> None:
    turbo = {**pipeline.model.scheduler_config, "timestep_spacing": "trailing"}
    alone = without_refiner(pipeline)
    alone = replace(alone, model=replace(alone.model, scheduler_config=turbo))
    for scheduler in ("euler", "euler-a"):
        fields = {**SMALL, "steps": 2, "guidance_scale": guidance_scale, "scheduler": scheduler}
        expected = reference_latents(base, UNGUIDED, config=turbo, **fields)
        assert torch.equal(latents(alone, UNGUIDED, **fields), expected)


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_is_zeros_only_where_the_folder_says_so(
    folders: dict[str, Path], base: StableDiffusionXLPipeline, tmp_path: Path, zeros: bool
) -> None:
    shutil.copytree(folders["base"], tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    alone = load_pipeline(tmp_path / "model")
    request = resolve(GenerationRequest(prompt="a cat", seed=1, **SMALL), alone.model.spec)
    inputs = alone.encode([request], guided=True, steps=4).at(1).inputs
    asked, no, pooled, no_pooled = base.encode_prompt("a cat", device="cpu", negative_prompt=None if zeros else "")
    assert torch.equal(inputs["encoder_hidden_states"], torch.cat([no, asked]))
    assert torch.equal(inputs["text_embeds"], torch.cat([no_pooled, pooled]))
    assert zeros == (not inputs["text_embeds"][0].any())


@pytest.mark.parametrize(
    "scheduler", [one for one in DIFFUSION_SCHEDULERS if SCHEDULERS[str(one.values[0])].begins_anywhere]
)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_refiner_takes_over_as_in_diffusers(
    pipeline: Pipeline,
    base: StableDiffusionXLPipeline,
    refiner: StableDiffusionXLImg2ImgPipeline,
    scheduler: str,
    guidance_scale: float,
) -> None:
    assert pipeline.refiner is not None
    batch = TWO if guidance_scale > 1 else UNGUIDED
    fields = {"steps": 5, "guidance_scale": guidance_scale, "scheduler": scheduler}
    shared = {**fields, "generator": batch.generators()}
    after: list[Tensor] = []
    reference_latents(
        base,
        batch,
        config=pipeline.model.scheduler_config,
        width=64,
        height=96,
        denoising_end=0.6,
        callback_on_step_end=lambda reference, step, t, kept: after.append(kept["latents"]) or {},
        **shared,
    )
    # with Heun's method, of two evaluations a step, diffusers begins a step too many, and the refiner does it again
    begun = after[-1 if scheduler != "heun" else -2]
    config = pipeline.refiner.model.scheduler_config
    expected = reference_latents(refiner, batch, config=config, image=begun, denoising_start=0.6, **shared)
    found = latents(pipeline, batch, width=64, height=96, refiner="refiner", refiner_start=0.6, **fields)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp-2m-karras"])
def test_a_start_image_gives_diffusers_latents_bit_for_bit(
    pipeline: Pipeline, base: StableDiffusionXLPipeline, tmp_path: Path, scheduler: str
) -> None:
    colours = torch.rand((3, 96, 64), generator=torch.Generator().manual_seed(5))
    from_pixels(colours).save(tmp_path / "start.png")
    reference = comparable(StableDiffusionXLImg2ImgPipeline(**base.components, requires_aesthetics_score=False))
    fields = {"steps": 5, "guidance_scale": 5.0, "strength": 0.6, "scheduler": scheduler}
    image = Image.open(tmp_path / "start.png")
    expected = reference_latents(reference, config=pipeline.model.scheduler_config, image=[image, image], **fields)
    assert torch.equal(latents(without_refiner(pipeline), init_image=str(tmp_path / "start.png"), **fields), expected)


def test_each_pass_is_told_its_own_size(pipeline: Pipeline) -> None:
    told: list[list[float]] = []
    hook = pipeline.model.unet.register_forward_pre_hook(
        lambda _, args, given: told.append(given["added_cond_kwargs"]["time_ids"][0].tolist()), with_kwargs=True
    )
    latents(without_refiner(pipeline), **SMALL, guidance_scale=5.0, scheduler="euler", upscale="2x:0.5:latent")
    hook.remove()
    assert told[0] == [96, 64, 0, 0, 96, 64]
    assert told[-1] == [192, 128, 0, 0, 192, 128]


def test_guidance_that_changes_goes_on_where_the_refiner_takes_over(pipeline: Pipeline, tmp_path: Path) -> None:
    fields = {**SMALL, "scheduler": "euler", "refiner": "refiner", "refiner_start": 0.5}
    falling = latents(pipeline, guidance_scale="7..2", **fields)
    assert falling.isfinite().all()
    assert not torch.equal(falling, latents(pipeline, guidance_scale=7.0, **fields))
    Image.new("RGB", (56, 96)).save(tmp_path / "start.png")
    with pytest.raises(UsageError, match="goes without --mask"):
        latents(pipeline, guidance_scale=7.0, init_image=str(tmp_path / "start.png"), extend="left=8", **fields)


def test_a_refiner_is_refused_where_one_of_the_two_would_have_nothing_to_do(pipeline: Pipeline) -> None:
    for start, idle in ((0.1, "base"), (0.999, "refiner")):
        with pytest.raises(UsageError, match=f"{idle} no step to do"):
            latents(pipeline, **SMALL, refiner="refiner", refiner_start=start, scheduler="ddim")


def test_a_control_of_the_refiner_s_steps_alone_is_refused(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcli.diffusion.sampling.active_controls", lambda pipeline, requests: [])
    Image.new("RGB", (56, 96)).save(tmp_path / "map.png")
    fields = {**SMALL, "scheduler": "euler", "refiner": "refiner", "refiner_start": 0.5}
    with pytest.raises(UsageError, match="in the refiner's steps alone"):
        latents(pipeline, controls=f"net={tmp_path}/map.png@0.7-1", **fields)


def test_a_refiner_neither_begins_nor_serves_another_family(pipeline: Pipeline, tiny_folder: Path) -> None:
    assert pipeline.refiner is not None
    other = load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu")
    with pytest.raises(UsageError, match="is a refiner"):
        Pipeline.of(pipeline.refiner.model)
    with pytest.raises(UsageError, match="tiny-sd is not"):
        Pipeline.of(other, refiner=pipeline.refiner.model)
    with pytest.raises(UsageError, match="tiny-sd is not"):
        Pipeline.of(pipeline.model, refiner=other)


def test_decoded_pixels_equal_diffusers(pipeline: Pipeline, base: StableDiffusionXLPipeline) -> None:
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    assert torch.equal(pipeline.space.decode(latents), base.image_processor.postprocess(decoded, output_type="pt"))


@pytest.mark.parametrize(
    ("number", "force_upcast", "computes_in"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_vae_is_spared_float16_unless_its_configuration_knows_better(
    folders: dict[str, Path], tmp_path: Path, number: torch.dtype, force_upcast: bool | None, computes_in: torch.dtype
) -> None:
    shutil.copytree(folders["base"], tmp_path / "model")
    file = tmp_path / "model/vae/config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "force_upcast"}
    file.write_text(json.dumps(config if force_upcast is None else {**config, "force_upcast": force_upcast}))
    build = from_folder(tmp_path / "model", SDXL, number)
    assert next(build.network("vae").parameters()).dtype == computes_in
    assert next(build.network("unet").parameters()).dtype == number


def test_the_vae_of_another_family_computes_in_the_dtype_that_was_asked_for(tiny_folder: Path) -> None:
    assert next(from_folder(tiny_folder, SD1, torch.float16).network("vae").parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 25}, "does not fit its text encoders"),
        ("unet", {"addition_embed_type": None}, "does not fit its text encoders"),
        ("vae", {"latents_mean": [0.0] * 4}, "a mean of their own"),
        ("text_encoder_2", {"projection_dim": "many"}, "describes no network"),
        ("text_encoder_2", {"projection_dim": 7}, "has shape"),
    ],
)
def test_what_does_not_fit_together_is_told_in_a_sentence(
    folders: dict[str, Path], tmp_path: Path, part: str, change: dict[str, Any], sentence: str
) -> None:
    shutil.copytree(folders["base"], tmp_path / "model")
    file = tmp_path / "model" / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if part == "unet":  # its weights are made to fit, so that only the condition does not
        network = build_empty(NETWORKS["UNet2DConditionModel"], json.loads(file.read_text()), source="unet")
        tensors = random_tensors(network, torch.float32, seed=0)
        save_file(tensors, tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(SdcliError, match=sentence):
        latents(load_pipeline(tmp_path / "model"), **SMALL, guidance_scale=5.0)


def test_what_sdxl_does_not_train_is_refused_before_its_weights_are_read(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    spec = spec_of_folder(shutil.copytree(folders["base"], tmp_path / "model"))
    (tmp_path / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match="no ControlNets yet"):
        load_to_train(spec, "train-controlnet", device="cpu")
    unknown = spec_of_folder(folders["base"]).model_copy(update={"family": SD1})
    with pytest.raises(UsageError, match="trains models of one"):  # where nothing said so beforehand
        load_to_train(unknown, "train-text-encoder", device="cpu", needs="vae")
    with pytest.raises(UsageError, match="is a refiner, which sdcli does not train"):
        load_to_train(spec_of_folder(folders["refiner"]), "train-unet", device="cpu")
    with pytest.raises(UsageError, match="has 2 text encoders"):
        load_model(spec, dtype="float32", device="cpu", parts=("vae", "text_encoder"))


def test_a_repository_that_no_entry_describes_is_what_its_files_say(folders: dict[str, Path]) -> None:
    snapshot = cached("somebody/finetune", folders["base"])
    spec, same = load_registry().find("somebody/finetune"), spec_of_folder(folders["base"])
    assert (spec.family.name, spec.kind, spec.defaults) == ("sdxl", same.kind, same.defaults)
    (snapshot / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match="no ControlNets yet"):
        load_to_train(spec, "train-controlnet", device="cpu")
    (snapshot / "unet/config.json").write_text("{")  # `models pull`, which finds it by its name too, mends it
    assert load_registry().find("somebody/finetune").family.name == "sd1"


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_counts_the_layers_of_both_encoders_from_the_end(
    pipeline: Pipeline, base: StableDiffusionXLPipeline, clip_skip: int
) -> None:
    inputs = told(pipeline, "a cat", clip_skip=clip_skip)
    # diffusers counts from the layer before the last, and so has no name for the last
    expected, _, pooled, _ = base.encode_prompt("a cat", device="cpu", clip_skip=clip_skip - 2)
    assert torch.equal(inputs["encoder_hidden_states"], expected)
    assert torch.equal(inputs["text_embeds"], pooled)
    with pytest.raises(UsageError, match="has 3 layers, so not 4"):
        told(pipeline, "a cat", clip_skip=4)


def test_an_embedding_is_what_diffusers_computes_with_its_vectors_in_both_vocabularies(
    pipeline: Pipeline, base: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 40)}
    save_file(vectors, tmp_path / "cat.safetensors")
    ids = base.tokenizer("one two").input_ids[1:3]
    encoders = [(base.text_encoder, "clip_l"), (base.text_encoder_2, "clip_g")]
    rows = [(encoder.get_input_embeddings().weight.data, vectors[name]) for encoder, name in encoders]
    kept = [table[ids].clone() for table, _ in rows]
    for table, own in rows:
        table[ids] = own
    expected, _, pooled, _ = base.encode_prompt("a thing one two hat", device="cpu")
    for (table, _), before in zip(rows, kept, strict=True):
        table[ids] = before
    inputs = told(pipeline, "a thing CAT hat", embeddings=[str(tmp_path / "cat.safetensors")])
    assert torch.equal(inputs["encoder_hidden_states"], expected)
    assert torch.equal(inputs["text_embeds"], pooled)


@pytest.mark.parametrize(
    ("tensors", "error", "sentence"),
    [
        ({"emb_params": (2, 32)}, UsageError, "made for one text encoder, and .* has two .*clip_l and clip_g"),
        ({"clip_l": (2, 32), "clip_g": (3, 40)}, BadWeights, "not as many vectors"),
        ({"clip_l": (2, 32), "clip_g": (2, 32)}, UsageError, "have 32 numbers, .* have 40"),
        ({}, BadWeights, "it has 0 tensors"),
    ],
)
def test_an_embedding_for_other_text_encoders_is_refused(
    pipeline: Pipeline, tmp_path: Path, tensors: dict[str, tuple[int, int]], error: type[SdcliError], sentence: str
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "cat.safetensors")
    with pytest.raises(error, match=sentence):
        told(pipeline, "a cat", embeddings=[str(tmp_path / "cat.safetensors")])


def test_a_refiner_takes_the_vectors_of_its_own_text_encoder(pipeline: Pipeline, tmp_path: Path) -> None:
    refiner = pipeline.refiner
    assert refiner is not None
    plain = told(refiner, "a cat")["encoder_hidden_states"]
    for name in ("clip_g", "anything"):  # the pair's, or one tensor alone
        save_file({name: torch.ones(1, 40)}, tmp_path / "cat.safetensors")
        found = told(refiner, "a cat", embeddings=[str(tmp_path / "cat.safetensors")])["encoder_hidden_states"]
        assert not torch.equal(found, plain)


def test_a_long_prompt_is_chunks_side_by_side_with_the_embedding_of_the_first(pipeline: Pipeline) -> None:
    words = " ".join(["cat"] * 75)
    short, long = told(pipeline, words), told(pipeline, f"{words} dog")
    assert long["encoder_hidden_states"].shape[1] == 2 * 77
    assert torch.equal(long["encoder_hidden_states"][:, :77], short["encoder_hidden_states"])
    assert torch.equal(long["encoder_hidden_states"][:, 77:], told(pipeline, "dog")["encoder_hidden_states"])
    assert torch.equal(long["text_embeds"], short["text_embeds"])


def test_a_weight_leaves_the_mean_of_each_encoders_states(pipeline: Pipeline) -> None:
    plain, weighted = (told(pipeline, prompt)["encoder_hidden_states"] for prompt in ("a cat", "a (cat:1.5)"))
    assert not torch.equal(plain, weighted)
    for states, others in zip(plain.split([32, 40], dim=-1), weighted.split([32, 40], dim=-1), strict=True):
        assert torch.allclose(states.mean(), others.mean(), atol=1e-6)


def told(pipeline: Pipeline, prompt: str, **fields: Any) -> dict[str, Tensor]:
    request = resolve(parse_request({"prompt": prompt, "seed": 1, **SMALL, **fields}), pipeline.model.spec)
    return dict(pipeline.encode([request], guided=False, steps=4).at(1).inputs)


def test_a_lora_reaches_the_unet_and_both_text_encoders(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline.model
    networks = {part: model.parts[part] for part in ("unet", "text_encoder", "text_encoder_2")}
    pairs = random_pairs(networks, only="attn")
    files = save_kohya(tmp_path / "k.safetensors", pairs), save_diffusers(tmp_path / "d.safetensors", pairs)
    merged = [with_loras(model, (LoraRef(path=str(file)),), folder=None) for file in files]
    for one in merged:
        assert not one.loras[0].unmatched
        assert one.loras[0].layers == sum(map(len, pairs.values()))
    for part, layers in pairs.items():
        for layer in layers:
            before, kohya, diffusers = (m.parts[part].get_parameter(f"{layer}.weight") for m in (model, *merged))
            assert torch.equal(kohya, diffusers)
            assert not torch.equal(kohya, before)


@pytest.mark.slow
def test_an_image_with_a_refiner_is_recorded_and_verifies(folders: dict[str, Path], tmp_path: Path) -> None:
    registry, run = load_registry(), RunSettings(device="cpu", dtype="float32")
    fields = {**SMALL, "prompt": "a cat", "model": str(folders["base"]), "refiner": str(folders["refiner"])}
    (job,) = expand([Line(1, fields)], {}, registry, num_images=1, base_seed=1)
    assert isinstance(job, ResolvedJob)
    assert job.request.refiner_start == 0.8
    *_, done = generate_files([job], tmp_path, cache=ModelCache(run))
    assert isinstance(done, Result)
    assert done.path is not None
    record = read_image(done.path).record
    assert record is not None
    assert set(record.provenance["weights"]) == {
        *("text_encoder", "text_encoder_2", "unet", "vae", "refiner_text_encoder_2", "refiner_unet")
    }
    assert verify_image(done.path, registry, run).identical
    assert "Refiner switch at: 0.8" in parameters_text(record)


@pytest.mark.slow
def test_another_refiner_leaves_the_model_as_it_is(folders: dict[str, Path]) -> None:
    cache = cache_of(dtype="float32")
    base, refiner = (spec_of_folder(folders[name]) for name in ("base", "refiner"))
    alone, refined, again = (pipeline_of(cache, base, refiner=one) for one in (None, refiner, None))
    assert alone.model is refined.model is again.model
    assert (alone.refiner, again.refiner) == (None, None)
    assert refined.refiner is not None


def test_a_tiny_sdxl_of_random_weights_needs_no_file() -> None:
    spec = ModelSpec(name="tiny-sdxl", source=RandomSource(kind="random", architecture="tiny-sdxl"), family="sdxl")
    pipeline = Pipeline.of(load_model(spec, device="cpu", dtype="bfloat16"))
    request = resolve(GenerationRequest(prompt="x", seed=1, width=64, height=64, steps=2), spec)
    *_, last = sample(pipeline, [request])
    assert pipeline.space.decode(last.latents).isfinite().all()
    assert pipeline.weights()["text_encoder_2"] == "random:tiny-sdxl:0"
