"""Stable Diffusion 3: diffusers' StableDiffusion3Pipeline and its Img2Img and Inpaint pipelines are the oracles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sdcli.diffusion import init_latents
from sdcli.diffusion.input_images import measure
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample, scheduler_for
from sdcli.diffusion.x0_prediction import x_t_and_x0
from sdcli.errors import BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.events import Result
from sdcli.generation.forward_process import ForwardProcess
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.images.metrics import distance
from sdcli.images.pixels import from_pixels
from sdcli.metadata.embed import parameters_text
from sdcli.metadata.read import read_image
from sdcli.models.families import SD3
from sdcli.models.folder import from_folder
from sdcli.models.hub.repo_files import first_missing
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.jobs import Line
from sdcli.request.schema import GenerationRequest, parse_request
from sdcli.training.model_parts import load_to_train, refuse_shifted
from sdcli.vae import autoencoder
from sdcli.vae.latent_files import latent_bytes, read_latents
from sdcli.vae.latent_record import LatentRecord
from tests.hub_server import cached
from tests.oracle import TWO, UNGUIDED, comparable, latents, load_pipeline, reference_latents, reference_of, requests_of
from tests.service import generate_files
from tests.tiny import save_tiny_sd3

SMALL = {"width": 64, "height": 96, "steps": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With T5 or without it, by whether it is there."""
    root = tmp_path_factory.mktemp("sd3")
    whole, small = save_tiny_sd3(root / "whole"), root / "small"
    shutil.copytree(whole, small, ignore=shutil.ignore_patterns("*_3"))
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index = json.loads((whole / "model_index.json").read_text())
    (small / "model_index.json").write_text(json.dumps({**index, **absent}))
    return {True: whole, False: small}


@pytest.fixture(scope="module")
def loaded_pipelines(folders: dict[bool, Path]) -> dict[bool, Pipeline]:
    return {t5: load_pipeline(folder) for t5, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders: dict[bool, Path]) -> dict[bool, StableDiffusion3Pipeline]:
    whole = reference_of(StableDiffusion3Pipeline, folders[True])
    small = StableDiffusion3Pipeline(**{**whole.components, "text_encoder_3": None, "tokenizer_3": None})
    return {True: whole, False: comparable(small)}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    colours = torch.rand((3, 96, 64), generator=torch.Generator().manual_seed(5))
    from_pixels(colours).save(tmp_path / "start.png")
    return tmp_path / "start.png"


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_latents_equal_diffusers_bit_for_bit_with_and_without_t5(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any], guidance_scale: float, t5: bool
) -> None:
    batch, fields = TWO if guidance_scale > 1 else UNGUIDED, {**SMALL, "guidance_scale": guidance_scale}
    expected = reference_latents(pipelines[t5], batch, **fields)
    assert torch.equal(latents(loaded_pipelines[t5], batch, **fields), expected)


def test_an_image_hardly_depends_on_its_batch(loaded_pipelines: dict[bool, Pipeline]) -> None:
    two = requests_of(loaded_pipelines[True], **SMALL)
    (*_, both), *singles = (list(sample(loaded_pipelines[True], some)) for some in (two, two[:1], two[1:]))
    for together, (*_, alone) in zip(both.latents, singles, strict=True):
        assert (together - alone.latents[0]).abs().max() < 1e-5 * together.abs().max()


def test_a_start_image_gives_diffusers_latents_bit_for_bit(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any], start: Path
) -> None:
    reference = comparable(StableDiffusion3Img2ImgPipeline(**pipelines[False].components))
    fields = {"steps": 5, "guidance_scale": 5.0, "strength": 0.6}
    image = Image.open(start)
    expected = reference_latents(reference, image=[image, image], width=64, height=96, **fields)
    assert torch.equal(latents(loaded_pipelines[False], **fields, init_image=str(start)), expected)


def test_a_mask_gives_diffusers_latents_bit_for_bit(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any], start: Path, tmp_path: Path
) -> None:
    mask = Image.new("L", (64, 96))
    mask.paste(255, (32, 0, 64, 96))
    mask.save(tmp_path / "mask.png")
    reference = comparable(StableDiffusion3InpaintPipeline(**pipelines[False].components))
    fields = {"steps": 5, "guidance_scale": 5.0, "strength": 0.6}
    images = {"image": [Image.open(start)] * 2, "mask_image": [mask] * 2}
    expected = reference_latents(reference, **images, width=64, height=96, **fields)
    given = {"init_image": str(start), "mask": str(tmp_path / "mask.png")}
    assert torch.equal(latents(loaded_pipelines[False], **fields, **given), expected)


def test_the_vae_shifts_its_latents_as_in_diffusers(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any], start: Path, tmp_path: Path
) -> None:
    pipeline, vae = loaded_pipelines[True], pipelines[True].vae
    latents = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = pipelines[True].image_processor.postprocess(decoded, output_type="pt")[0]
    assert torch.equal(pipeline.space.decode(latents)[0], expected)
    own = torch.randn((1, 16, 12, 8), generator=torch.Generator().manual_seed(1))
    shifted = autoencoder.scale(pipeline.model.vae, own)
    assert torch.equal(shifted, (own - 0.0609) * 1.5305)
    assert torch.allclose(autoencoder.unscale(pipeline.model.vae, shifted), own, atol=1e-6)


def test_latent_files_hold_what_the_vae_says_and_painting_starts_from_it_scaled(
    loaded_pipelines: dict[bool, Pipeline], tmp_path: Path
) -> None:
    pipeline, file = loaded_pipelines[False], tmp_path / "start.safetensors"
    vae = LoadedVae.load(pipeline.model.spec, RunSettings(device="cpu"))
    own, _ = vae.encode([torch.rand((3, 96, 64), generator=torch.Generator().manual_seed(5))], seeds=None)
    scaled = autoencoder.scale(pipeline.model.vae, own)
    apart = distance(vae.decode(own[0])[0], from_pixels(pipeline.space.decode(scaled)[0]))
    assert apart is not None
    assert apart.largest <= 1
    record = LatentRecord(model="m", vae="v", scaling_factor=1.5305, sample="mean", source=())
    file.write_bytes(latent_bytes(own, record))
    request = resolve(parse_request({"init_image": str(file), "seed": 1}), pipeline.model.spec, measure=measure)
    assert request.final_size == (64, 96)
    assert torch.equal(init_latents._latents_of_file(pipeline, request, (16, 12, 8)), scaled)
    save_file({"latents": scaled.contiguous()}, file)
    plain = read_latents(file, scaled=True).unscaled(vae.scaling_factor, vae.shift_factor)
    assert torch.allclose(plain, own, atol=1e-6)


def test_the_last_guess_is_the_image_and_the_first_look_the_noise(loaded_pipelines: dict[bool, Pipeline]) -> None:
    pipeline = loaded_pipelines[False]
    requests = requests_of(pipeline, **SMALL)
    scheduler = scheduler_for(pipeline.model, requests[0])
    first, *_, last = sample(pipeline, requests)
    assert torch.equal(x_t_and_x0(scheduler, first)[0], first.x)
    assert torch.allclose(x_t_and_x0(scheduler, last)[1], last.latents, atol=1e-5)


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_counts_from_the_end_as_for_sdxl(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any], clip_skip: int
) -> None:
    inputs = told(loaded_pipelines[True], "a cat", clip_skip=clip_skip)
    with torch.no_grad():
        expected, _, pooled, _ = pipelines[True].encode_prompt("a cat", None, None, clip_skip=clip_skip - 2)
    assert torch.equal(inputs["encoder_hidden_states"], expected)
    assert torch.equal(inputs["pooled_projections"], pooled)


def test_t5_reads_the_words_without_their_weights_and_behind_all_chunks(loaded_pipelines: dict[bool, Pipeline]) -> None:
    plain, weighted = (
        told(loaded_pipelines[True], text)["encoder_hidden_states"] for text in ("a cat, red", "a (cat:1.5), [red]")
    )
    assert not torch.equal(plain[:, :77], weighted[:, :77])
    assert torch.equal(plain[:, 77:], weighted[:, 77:])
    long = told(loaded_pipelines[True], " ".join(["cat"] * 76))["encoder_hidden_states"]
    assert long.shape[1] == 2 * 77 + 256
    assert not told(loaded_pipelines[False], "a cat")["encoder_hidden_states"][:, 77:].any()


def told(pipeline: Pipeline, prompt: str, **fields: Any) -> dict[str, Tensor]:
    request = resolve(parse_request({"prompt": prompt, "seed": 1, **SMALL, **fields}), pipeline.model.spec)
    return dict(pipeline.encode([request], guided=False, steps=4).at(1).inputs)


def test_the_t5_tokenizer_is_transformers_also_where_it_cuts(
    loaded_pipelines: dict[bool, Pipeline], pipelines: dict[bool, Any]
) -> None:
    tokenizer = loaded_pipelines[True].model.tokenizers["text_encoder_3"]
    assert tokenizer is not None
    for text in ("", "a (cat), 7 Dogs", "cat " * 300):
        expected = pipelines[True].tokenizer_3(text, padding="max_length", max_length=256, truncation=True)
        assert tokenizer(text) == expected.input_ids


def test_t5_in_float16_keeps_its_widest_sums_in_float32(folders: dict[bool, Path]) -> None:
    network = from_folder(folders[True], SD3, torch.float16).network("text_encoder_3")
    numbers = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert {name for name, number in numbers.items() if number == torch.float32} == {
        name for name in numbers if ".wo." in name
    }


@pytest.mark.slow
def test_an_image_is_recorded_and_verifies(folders: dict[bool, Path], tmp_path: Path) -> None:
    registry, run = load_registry(), RunSettings(device="cpu", dtype="float32")
    fields = {**SMALL, "prompt": "a cat", "model": str(folders[True])}
    (job,) = expand([Line(1, fields)], {}, registry, num_images=1, base_seed=1)
    assert isinstance(job, ResolvedJob)
    *_, done = generate_files([job], tmp_path, cache=ModelCache(run))
    assert isinstance(done, Result)
    assert done.path is not None
    record = read_image(done.path).record
    assert record is not None
    assert set(record.provenance["weights"]) == {"text_encoder", "text_encoder_2", "text_encoder_3", "unet", "vae"}
    assert "Sampler: Flow Euler" in parameters_text(record)
    assert verify_image(done.path, registry, run).identical


def test_in_half_precision_it_paints_too(folders: dict[bool, Path]) -> None:
    pipeline = Pipeline.of(load_model(spec_of_folder(folders[True]), dtype="bfloat16", device="cpu"))
    assert latents(pipeline, **SMALL).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"scheduler": "ddim"}, "those that do: flow-euler"),
        ({"refiner": "sdxl-refiner"}, "refiner: sdcli has none for"),
        ({"loras": ["x.safetensors"]}, "loras: sdcli has none for"),
        ({"embeddings": ["x.safetensors"]}, "embeddings: sdcli has none for"),
        ({"pag_scale": 3.0}, "pag_scale: sdcli has none for"),
        ({"eta": 0.5}, "eta has no effect"),
        ({"width": 72}, "multiple of 16"),
        ({"width": 64, "height": 208}, "at most 192 pixels"),
        ({"upscale": "3x"}, "at most 192 pixels"),
        ({"clip_skip": 4}, "has 3 layers"),
    ],
)
def test_what_it_cannot_do_is_refused(
    loaded_pipelines: dict[bool, Pipeline], fields: dict[str, Any], sentence: str
) -> None:
    asked = parse_request({"prompt": "a cat", "seed": 1, **SMALL, **fields})
    with pytest.raises(UsageError, match=sentence):
        loaded_pipelines[False].encode.shape(resolve(asked, loaded_pipelines[False].model.spec))


def test_its_scheduler_is_refused_for_diffusion_models(tiny_folder: Path) -> None:
    asked = GenerationRequest(prompt="a cat", seed=1, scheduler="flow-euler")
    with pytest.raises(UsageError, match="was trained as a diffusion model; those that do: ddpm"):
        resolve(asked, spec_of_folder(tiny_folder))


def test_other_commands_refuse_it(loaded_pipelines: dict[bool, Pipeline]) -> None:
    model = loaded_pipelines[False].model
    with pytest.raises(UsageError, match="sd3 family, which sdcli generates with but does not train yet"):
        load_to_train(model.spec, "train-unet", device="cpu")
    with pytest.raises(UsageError, match="shifts its latents"):
        refuse_shifted(model)
    with pytest.raises(UsageError, match="trained with flow matching"):
        ForwardProcess.of(model.spec, RunSettings())
    with pytest.raises(UsageError, match="jointly, so there are no maps"):
        loaded_pipelines[False].encode.read(requests_of(loaded_pipelines[False])[0])
    with pytest.raises(UsageError, match="not of a family with refiners"):
        Pipeline.of(model, refiner=model)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("transformer/config.json", {"patch_size": "2"}, "cannot have patches of '2'"),
        ("transformer/config.json", {"in_channels": 4}, "takes 4 channels and its VAE makes 16"),
        ("transformer/config.json", {"pos_embed_max_size": None}, "describes no network"),
        ("transformer/config.json", {"num_layers": 3}, "lacks"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "sets use_dynamic_shifting"),
        ("scheduler/scheduler_config.json", {"shift": "much"}, "describes no noise schedule"),
        ("text_encoder_2/config.json", {"projection_dim": 8}, "has shape"),
        ("text_encoder_3/config.json", {"d_model": 32}, "has shape"),
        ("text_encoder_3/config.json", {"num_heads": "many"}, "describes no network"),
        ("tokenizer_3/tokenizer.json", {"model": None}, "no usable T5 tokenizer"),
    ],
)
def test_a_broken_folder_is_told_in_a_sentence(
    folders: dict[bool, Path], tmp_path: Path, file: str, change: dict[str, Any], sentence: str
) -> None:
    shutil.copytree(folders[True], tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SdcliError, match=sentence):
        latents(load_pipeline(tmp_path / "model"), **SMALL)


def test_text_encoders_of_another_width_are_told(folders: dict[bool, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[False], tmp_path / "model")
    other = save_tiny_sd3(tmp_path / "other", t5=False, joint_attention_dim=32)
    shutil.rmtree(tmp_path / "model/transformer")
    shutil.copytree(other / "transformer", tmp_path / "model/transformer")
    with pytest.raises(BadWeights, match="does not fit its text encoders"):
        latents(load_pipeline(tmp_path / "model"), **SMALL)


def test_a_single_file_is_refused_by_its_name(tmp_path: Path) -> None:
    tensors = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "sd3.safetensors")
    with pytest.raises(UsageError, match="as a diffusers folder"):
        load_model(load_registry().find(str(tmp_path / "sd3.safetensors")), device="cpu")


def test_a_model_of_the_hub_has_its_kind_before_it_is_there() -> None:
    spec = load_registry().find("sd3-medium")
    request = resolve(GenerationRequest(prompt="a cat", seed=1), spec)
    assert {name: getattr(request, name) for name in SD3.defaults} == SD3.defaults
    with pytest.raises(UsageError, match="multiple of 16"):
        resolve(GenerationRequest(prompt="a cat", seed=1, width=1000), spec)


def test_a_repository_in_the_cache_is_of_the_family_that_its_files_say(folders: dict[bool, Path]) -> None:
    name = "somebody/finetune"
    assert load_registry().find(name).family.process == "diffusion"
    cached(name, folders[False])
    spec = load_registry().find(name)
    assert (spec.family.name, spec.kind) == ("sd3", spec_of_folder(folders[False]).kind)
    assert resolve(GenerationRequest(prompt="a cat", seed=1), spec).scheduler == "flow-euler"
    assert load_model(spec, device="cpu", parts=("vae",)).spec.family.process == "flow"


@pytest.mark.parametrize(
    "file", ["transformer/config.json", "text_encoder_3/model.safetensors", "tokenizer_3/tokenizer.json"]
)
def test_a_partial_download_names_what_is_missing(folders: dict[bool, Path], tmp_path: Path, file: str) -> None:
    spec = spec_of_folder(folders[True])
    assert first_missing(folders[True], spec) is None
    assert first_missing(folders[False], spec) is None
    shutil.copytree(folders[True], tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    assert first_missing(tmp_path / "model", spec) == file
    if file.startswith("tokenizer"):
        with pytest.raises(NotFound, match="the tokenizer needs it"):
            load_pipeline(tmp_path / "model")
