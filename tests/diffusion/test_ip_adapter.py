"""IP-Adapters: parity with diffusers, what stays as it was, and what is refused."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.diffusion.attention.maps import AttentionMaps
from sdcli.diffusion.attention.sliced import SlicedSelfAttention
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import BadImage, BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.plan import Limits, plan
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.models.registry import load_registry
from sdcli.request.command_line import request_arguments
from sdcli.request.fields import ImagePrompt
from sdcli.request.jobs import read_lines
from sdcli.request.schema import GenerationRequest, parse_request
from tests.models.families.test_pixel_models import save_pixel_model
from tests.oracle import comparable, prompts, reference_latents, reference_of
from tests.service import cache_of, generate_files, indices, pipeline_for, pipeline_of, results
from tests.tiny import save_tiny_controlnet, save_tiny_ip_adapter, save_tiny_pipeline, save_tiny_sdxl

STEPS = 3
KINDS = ("plain", "plus", "full")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder as h94/IP-Adapter has it, with adapters of each kind for the micro model, and two images."""
    folder = tmp_path_factory.mktemp("ip-adapter")
    for seed, kind in enumerate(KINDS, start=1):
        save_tiny_ip_adapter(folder / "models", tiny_folder, kind=kind, seed=seed)
    source = np.random.default_rng(0)
    for name, size in (("a", (64, 48)), ("b", (33, 77))):
        Image.fromarray(source.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@cache
def cache(dtype: str = "float32") -> ModelCache:
    return cache_of(dtype=dtype, safety="off")


def resolved(model: Path, **fields: Any) -> GenerationRequest:
    asked = {"prompt": "a cat", "seed": 3, "steps": STEPS, "width": 64, "height": 48, "scheduler": "ddim", **fields}
    return resolve(parse_request(asked), load_registry().find(str(model)))


def ours(model: Path, *requests: dict[str, Any], **fields: Any) -> Tensor:
    asked = [resolved(model, **fields, **request) for request in requests or ({},)]
    *_, last = sample(pipeline_for(cache(), asked[0]), asked)
    return last.latents


def oracle(model: Path, files: Path, kind: type, *names: str, **more: Any) -> Any:
    reference = reference_of(kind, model, **more)
    listed = [f"{name}.safetensors" for name in names]
    reference.load_ip_adapter(files, subfolder=["models"] * len(names), weight_name=listed)
    return comparable(reference)


def theirs(model: Path, reference: Any, *, scale: float, seeds: tuple[int, ...] = (3,), **given: Any) -> Tensor:
    batch = prompts(*["a cat"] * len(seeds), seeds=seeds)
    config = pipeline_of(cache(), load_registry().find(str(model))).model.scheduler_config
    fields = {"steps": STEPS, "width": 64, "height": 48, "scheduler": "ddim", "config": config}
    return reference_latents(reference, batch, guidance_scale=scale, **fields, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_prompt_gives_diffusers_latents_bit_for_bit(tiny_folder: Path, files: Path, kind: str) -> None:
    reference = oracle(tiny_folder, files, StableDiffusionPipeline, kind)
    reference.set_ip_adapter_scale(0.7)
    image = Image.open(files / "a.png")
    for scale in (1.0, 5.0):
        expected = theirs(tiny_folder, reference, scale=scale, ip_adapter_image=image)
        got = ours(
            tiny_folder, ip_adapters=f"{files}/models/{kind}.safetensors={files}/a.png:0.7", guidance_scale=scale
        )
        assert torch.equal(got, expected)
    assert not torch.equal(got, ours(tiny_folder, guidance_scale=5.0))


def test_images_of_one_batch_are_prompted_by_two_adapters_and_their_own_images(tiny_folder: Path, files: Path) -> None:
    reference = oracle(tiny_folder, files, StableDiffusionPipeline, "plain", "plus")
    reference.set_ip_adapter_scale([0.7, 1.5])
    a, b = (Image.open(files / f"{name}.png") for name in "ab")
    embeds = [reference.prepare_ip_adapter_image_embeds(images, None, "cpu", 1, True) for images in ([a, b], [b, a])]
    rows = [torch.stack([one[row] for row in (0, 1) for one in pair]) for pair in zip(*embeds, strict=True)]
    # diffusers repeats what is given for each image of the batch, so it cannot be given one each
    reference.prepare_ip_adapter_image_embeds = lambda *_: rows
    expected = theirs(tiny_folder, reference, scale=5.0, seeds=(7, 8), ip_adapter_image=[a, b])
    plain, plus = (f"{files}/models/{kind}.safetensors=" for kind in ("plain", "plus"))
    prompts = [(f"{files}/a.png", f"{files}/b.png", 7), (f"{files}/b.png", f"{files}/a.png", 8)]
    requests = [{"ip_adapters": [f"{plain}{one}:0.7", f"{plus}{two}:1.5"], "seed": seed} for one, two, seed in prompts]
    assert torch.equal(ours(tiny_folder, *requests, guidance_scale=5.0), expected)


def test_an_image_prompt_beside_a_control_gives_diffusers_latents_bit_for_bit(tiny_folder: Path, files: Path) -> None:
    net = save_tiny_controlnet(files / "net", tiny_folder)
    reference = oracle(
        tiny_folder, files, StableDiffusionControlNetPipeline, "plain", controlnet=ControlNetModel.from_pretrained(net)
    )
    control, image = (Image.open(files / f"{name}.png") for name in "ab")
    expected = theirs(tiny_folder, reference, scale=5.0, image=control.resize((64, 48)), ip_adapter_image=image)
    control.resize((64, 48)).save(files / "map.png")
    given = {"controls": f"{net}={files}/map.png", "ip_adapters": f"{files}/models/plain.safetensors={files}/b.png"}
    assert torch.equal(ours(tiny_folder, guidance_scale=5.0, **given), expected)


@pytest.mark.slow
def test_an_image_prompt_of_sdxl_gives_diffusers_latents_bit_for_bit(files: Path, tmp_path: Path) -> None:
    model = save_tiny_sdxl(tmp_path / "sdxl")
    adapter = save_tiny_ip_adapter(tmp_path / "models", model)
    reference = oracle(model, tmp_path, StableDiffusionXLPipeline, "plain", add_watermarker=False)
    expected = theirs(model, reference, scale=5.0, ip_adapter_image=Image.open(files / "a.png"))
    got = ours(model, guidance_scale=5.0, ip_adapters=f"{adapter}={files}/a.png")
    assert torch.equal(got, expected)


def test_a_later_image_without_an_adapter_is_as_before(tiny_folder: Path, files: Path) -> None:
    before = ours(tiny_folder)
    prompts = f"{files}/models/plus.safetensors={files}/a.png"
    assert not torch.equal(ours(tiny_folder, ip_adapters=prompts), before)
    assert torch.equal(ours(tiny_folder), before)
    with pytest.raises(UsageError, match="was loaded with other IP-Adapters"):
        next(iter(sample(pipeline_for(cache(), resolved(tiny_folder)), [resolved(tiny_folder, ip_adapters=prompts)])))


def test_an_image_prompt_is_of_the_prompt_alone_whatever_becomes_of_the_text(tiny_folder: Path, files: Path) -> None:
    given = {"ip_adapters": f"{files}/models/plain.safetensors={files}/a.png", "guidance_scale": 5.0}
    plain = ours(tiny_folder, **given)
    assert torch.equal(ours(tiny_folder, prompt="[a cat:a cat:0.5]", **given), plain)
    assert torch.allclose(ours(tiny_folder, prompt="a cat AND a dog:0", **given), plain, rtol=1e-3, atol=1e-3)
    assert not torch.equal(ours(tiny_folder, pag_scale=2.0, **given), plain)
    assert torch.equal(ours(tiny_folder, guidance_interval="0-1", **given), plain)


@pytest.mark.slow
def test_the_image_weighs_more_the_larger_its_weight(tiny_folder: Path, files: Path) -> None:
    plain = ours(tiny_folder)
    adapter = f"{files}/models/plain.safetensors={files}/a.png"
    apart = [float((ours(tiny_folder, ip_adapters=f"{adapter}:{w}") - plain).norm()) for w in (1e-4, 1e-3, 1e-2)]
    assert apart[0] < apart[1] < apart[2]


def test_the_maps_of_words_are_those_of_the_text_alone(tiny_folder: Path, files: Path) -> None:
    def maps(**fields: Any) -> Tensor:
        request = resolved(tiny_folder, **fields)
        own = pipeline_for(cache(), request)
        with AttentionMaps(1).recording(own.model.unet) as watched:
            for _ in sample(own, [request]):
                watched.step((6, 8))
        return next(iter(watched._sums.values()))

    adapter = f"{files}/models/plain.safetensors={files}/a.png"
    plain, faint, strong = maps(), maps(ip_adapters=f"{adapter}:1e-6"), maps(ip_adapters=adapter)
    assert torch.allclose(plain, faint, atol=1e-4)
    assert strong.shape == plain.shape
    assert not torch.allclose(strong, plain, atol=1e-4)  # other features attend otherwise
    assert torch.allclose(strong.sum(dim=-1), plain.sum(dim=-1))


def test_half_precision_on_the_cpu_keeps_its_own_self_attention(tiny_folder: Path, files: Path) -> None:
    request = resolved(tiny_folder, ip_adapters=f"{files}/models/plus.safetensors={files}/a.png")
    own = pipeline_for(cache("bfloat16"), request)
    processors = own.model.unet.attn_processors
    layers = [name for name in processors if name.endswith("attn1.processor")]
    assert layers
    assert all(isinstance(processors[name], SlicedSelfAttention) for name in layers)
    assert {parameter.dtype for parameter in own.model.unet.parameters()} == {torch.bfloat16}
    *_, last = sample(own, [request])
    assert last.latents.isfinite().all()


def test_jobs_that_differ_in_their_images_alone_are_one_batch(tiny_folder: Path, files: Path) -> None:
    adapter = f"{files}/models/plain.safetensors"
    asked = [f"{adapter}={files}/a.png:0.5", f"{adapter}={files}/b.png:0.5", f"{adapter}={files}/a.png:0.6", []]
    jobs = [ResolvedJob.of(n, resolved(tiny_folder, ip_adapters=one), load_registry()) for n, one in enumerate(asked)]
    assert indices(plan(jobs, Limits(4))) == [[0, 1], [2], [3]]


@pytest.mark.slow
def test_an_image_with_an_image_prompt_paints_again_from_its_record(
    tiny_folder: Path, files: Path, tmp_path: Path
) -> None:
    adapter = save_tiny_ip_adapter(tmp_path / "models", tiny_folder)
    (tmp_path / "seen.png").write_bytes((files / "a.png").read_bytes())
    request = resolved(tiny_folder, ip_adapters=f"{adapter}={tmp_path}/seen.png:0.6")
    run = RunSettings(device="cpu", dtype="float32", safety="off")
    jobs = [ResolvedJob.of(1, request, load_registry())]
    (result,) = results(generate_files(jobs, tmp_path / "out", cache=ModelCache(run)))
    assert result.path is not None, result.error
    assert verify_image(result.path, load_registry(), run).sentence().endswith(": identical")
    again = GenerationRequest.model_validate(request.model_dump())
    Image.new("RGB", (8, 8)).save(tmp_path / "seen.png")
    with pytest.raises(UsageError, match="is another file than the one that was generated with"):
        resolve(again, load_registry().find(str(tiny_folder)))
    save_tiny_ip_adapter(tmp_path / "models", tiny_folder, seed=5)
    with pytest.raises(UsageError, match="is another file than the one that was generated with"):
        resolve(again, load_registry().find(str(tiny_folder)))


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("a.safetensors=b.png", ("a.safetensors", "b.png", 1.0)),
        ("a.safetensors=b=c:d.png:0.25", ("a.safetensors", "b=c:d.png", 0.25)),
        ("a:0.5.safetensors=-", ("a:0.5.safetensors", "-", 1.0)),
    ],
)
def test_the_spelling_of_an_image_prompt_is_read_back(spelling: str, meant: tuple[str, str, float]) -> None:
    read = ImagePrompt.model_validate(spelling)
    assert (read.adapter.path, read.image.path, read.weight) == meant
    assert ImagePrompt.model_validate(str(read)) == read
    assert request_arguments(parse_request({"ip_adapter": spelling})) == ["--ip-adapter", str(read), "--", ""]


@pytest.mark.parametrize(
    ("spelling", "why"),
    [
        ("a.safetensors", "is written as ADAPTER=IMAGE"),
        ("a.safetensors=", "is written as ADAPTER=IMAGE"),
        ("a.safetensors=b.png:0", "has no effect at weight 0"),
        ("a.safetensors=b.png:11", "less than or equal to 10"),
        ({"adapter": "a=b.safetensors", "image": "c.png"}, "has a = in its name"),
    ],
)
def test_an_image_prompt_that_cannot_be_is_refused(spelling: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_request({"ip_adapter": spelling})


def test_lines_of_a_prompt_file_have_image_prompts_too(tmp_path: Path) -> None:
    fields = {"prompt": "a cat", "ip_adapters": ["a.safetensors=b.png:0.5", "a.safetensors=c.png"]}
    (tmp_path / "lines.jsonl").write_text(json.dumps(fields))
    (tmp_path / "lines.txt").write_text("a cat --ip-adapter a.safetensors=b.png:0.5 --ip-adapter a.safetensors=c.png")
    one, other = (next(iter(read_lines(str(tmp_path / f"lines.{kind}")))) for kind in ("jsonl", "txt"))
    assert parse_request(one.fields) == parse_request(other.fields)


# Files


def loaded(model: Path, files: Path, adapter: Path) -> Pipeline:
    return pipeline_for(cache(), resolved(model, ip_adapters=f"{adapter}={files}/a.png"))


def changed(adapter: Path, **tensors: Tensor | None) -> Path:
    """The file with other tensors, or without them, beside it."""
    kept = {name: one for name, one in {**load_file(adapter), **tensors}.items() if one is not None}
    save_file(kept, adapter.with_name("changed.safetensors"))
    return adapter.with_name("changed.safetensors")


@pytest.mark.slow
def test_a_file_that_is_no_adapter_or_not_the_models_is_refused_with_a_sentence(
    tiny_folder: Path, files: Path, tmp_path: Path
) -> None:
    adapter = save_tiny_ip_adapter(tmp_path / "deep/models", tiny_folder)
    key = "ip_adapter.1.to_k_ip.weight"
    wide = save_tiny_ip_adapter(tmp_path / "wide", save_tiny_pipeline(tmp_path / "other", cross_attention_dim=48))
    pickled, renamed = tmp_path / "adapter.bin", tmp_path / "renamed.safetensors"
    for path in (pickled, renamed):
        torch.save({"image_proj": {}, "ip_adapter": {}}, path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:-100])
    alone = tmp_path / "alone/apart/x.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(adapter.read_bytes())
    faces = {"image_proj.proj.weight": None, "image_proj.proj.0.weight": torch.ones(2, 2)}
    cases: list[tuple[Path | dict[str, Any], type[SdcliError], str]] = [
        (tmp_path / "missing.safetensors", NotFound, "no file"),
        (tiny_folder, UsageError, "not a .safetensors file"),
        (pickled, UsageError, "not a .safetensors file"),
        (renamed, BadWeights, "is a pickle"),
        (cut, BadWeights, "cut short"),
        (tiny_folder / "vae/diffusion_pytorch_model.safetensors", BadWeights, "is not an IP-Adapter"),
        (wide, UsageError, r"does not fit .* another UNet \(ip_adapter.1.to_k_ip.weight is .*x48, and"),
        (alone, NotFound, "no image encoder"),
        ({key: None}, UsageError, "was made for 3 cross-attention layers, and the model has 4"),
        ({key: None, "ip_adapter.2.to_k_ip.weight": torch.ones(1)}, BadWeights, "damaged: it has no ip_adapter.1.to_k"),
        ({"image_proj.norm.weight": None}, BadWeights, "not laid out as an IP-Adapter"),
        ({"image_proj.more": torch.ones(1)}, BadWeights, "not laid out as an IP-Adapter"),
        (
            {"image_proj.proj.weight": torch.ones(128, 23)},
            UsageError,
            "needs an image encoder whose projection_dim is 23",
        ),
        (faces, UsageError, "FaceID"),
    ]
    for given, error, why in cases:
        with pytest.raises(error, match=why):
            loaded(tiny_folder, files, changed(adapter, **given) if isinstance(given, dict) else given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"patch_size": 0}, BadWeights, "describes no network"),
        ({"hidden_act": "boom"}, BadWeights, "describes no network"),
        ({"hidden_size": "many"}, BadWeights, "describes no image encoder"),
        ({"image_size": 1_000_000}, BadWeights, "embeddings.position_embedding.weight has shape"),
        ({"num_hidden_layers": 2}, BadWeights, "has no place for"),
        ({"projection_dim": "many"}, UsageError, "whose projection_dim is 24"),
    ],
)
def test_a_damaged_image_encoder_is_refused(
    tiny_folder: Path, files: Path, tmp_path: Path, change: dict[str, Any], error: type[SdcliError], why: str
) -> None:
    adapter = save_tiny_ip_adapter(tmp_path, tiny_folder)
    config = tmp_path / "image_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(error, match=why):
        loaded(tiny_folder, files, adapter)


@pytest.mark.slow
def test_the_first_encoder_that_fits_is_taken(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    adapter = save_tiny_ip_adapter(tmp_path / "sdxl_models", tiny_folder)
    shared = tmp_path / "models/image_encoder"
    shared.parent.mkdir()
    (tmp_path / "sdxl_models/image_encoder").rename(shared)
    expected = ours(tiny_folder, ip_adapters=f"{adapter}={files}/a.png")
    wrong = tmp_path / "sdxl_models/image_encoder"
    wrong.mkdir()
    (wrong / "config.json").write_text(json.dumps({"projection_dim": 1280}))
    os.utime(adapter)
    assert torch.equal(ours(tiny_folder, ip_adapters=f"{adapter}={files}/a.png"), expected)
    for weights in shared.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadWeights, match="is a pickle"):
        pipeline_for(cache_of(), resolved(tiny_folder, ip_adapters=f"{adapter}={files}/a.png"))


def test_an_image_that_cannot_be_seen_fails_alone(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    adapter = f"{files}/models/plain.safetensors"
    Image.new("RGB", (1, 900)).save(tmp_path / "long.png")
    (tmp_path / "text.png").write_text("no image")
    images = [str(tmp_path / "long.png"), str(tmp_path / "text.png"), f"{files}/a.png"]
    jobs = [
        ResolvedJob.of(n, resolved(tiny_folder, ip_adapters=f"{adapter}={one}"), load_registry())
        for n, one in enumerate(images)
    ]
    found = results(generate_files(jobs, tmp_path / "out", cache=cache()))
    assert [result.status for result in found] == ["failed", "failed", "done"]
    assert all(isinstance(result.error, BadImage) for result in found[:2])


def test_a_model_without_captions_takes_no_image_prompt(files: Path, tmp_path: Path) -> None:
    model = save_pixel_model(tmp_path / "pixels", sample_size=32)
    spec, prompts = load_registry().find(str(model)), f"{files}/models/plain.safetensors={files}/a.png"
    with pytest.raises(UsageError, match="takes no captions"):
        resolve(parse_request({"ip_adapters": prompts}), spec)
