"""ControlNets: parity with diffusers, the maps that they see, and what is refused."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.cli.control_map import command as save_map
from sdcli.diffusion.input_images import measure
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.errors import BadImage, BadWeights, NotFound, Offline, SdcliError, UsageError
from sdcli.generation.plan import Limits, plan
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.images.preprocessors import PREPROCESSORS, control_map
from sdcli.io.files import AlreadyExists
from sdcli.models.controlnet import load_controlnet, with_controlnets
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.fields import Control, Preprocessor
from sdcli.request.jobs import read_lines
from sdcli.request.schema import GenerationRequest, parse_request
from tests.ldm import ldm_controlnet
from tests.oracle import Batch, comparable, latents, prompts, reference_latents
from tests.service import cache_of, generate_images, pipeline_for
from tests.tiny import save_tiny_controlnet, save_tiny_pipeline, save_tiny_sdxl

STEPS = 5
CAT, CATS = prompts("a cat", seeds=(7,)), prompts("a cat", "a cat")
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Two ControlNets for the micro model, `one` and `two`; three images of 64x48, and mask.png."""
    folder = tmp_path_factory.mktemp("control")
    for seed, name in enumerate(NAMES, start=1):
        save_tiny_controlnet(folder / name, tiny_folder, seed=seed)
    source = np.random.default_rng(0)
    for name in ("a", "b", "start"):
        coarse = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@cache
def loaded(model: Path, files: Path) -> LoadedModel:
    plain = load_model(spec_of_folder(model), dtype="float32", device="cpu")
    registry = load_registry()
    nets = {str(files / name): load_controlnet(registry.find_controlnet(str(files / name)), plain) for name in NAMES}
    return with_controlnets(plain, nets)


@cache
def pipeline(model: Path, files: Path) -> Pipeline:
    return Pipeline.of(loaded(model, files))


@cache
def oracle(model: Path, files: Path, kind: type, nets: tuple[str, ...]) -> Any:
    plain = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    controls = [ControlNetModel.from_pretrained(files / name) for name in nets]
    controlnet = controls[0] if len(controls) == 1 else MultiControlNetModel(controls)
    return comparable(kind(**plain.components, controlnet=controlnet, requires_safety_checker=False))


def resolved(pipeline: Pipeline, **fields: Any) -> GenerationRequest:
    asked = parse_request({"prompt": "a cat", "seed": 3, "steps": STEPS, "width": 64, "height": 48, **fields})
    return resolve(asked, pipeline.model.spec, measure=measure)


def ours(pipeline: Pipeline, batch: Batch = CATS, **fields: Any) -> Tensor:
    return latents(pipeline, batch, **{"steps": STEPS, "width": 64, "height": 48, **fields})


def theirs(pipeline: Pipeline, reference: Any, scheduler: str, batch: Batch, *, scale: float, **given: Any) -> Tensor:
    config = pipeline.model.scheduler_config
    return reference_latents(
        reference, batch, steps=STEPS, guidance_scale=scale, scheduler=scheduler, config=config, **given
    )


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler-a", "heun", "dpmpp-2m-karras"])
def test_a_control_gives_diffusers_latents_bit_for_bit(
    tiny_folder: Path, files: Path, scheduler: str, part: tuple[float, float]
) -> None:
    own, reference = (
        pipeline(tiny_folder, files),
        oracle(tiny_folder, files, StableDiffusionControlNetPipeline, ("one",)),
    )
    expected = theirs(
        own,
        reference,
        scheduler,
        CAT,
        scale=5.0,
        image=Image.open(files / "a.png"),
        controlnet_conditioning_scale=0.7,
        control_guidance_start=part[0],
        control_guidance_end=part[1],
    )
    control = f"{files}/one={files}/a.png:0.7@{part[0]}-{part[1]}"
    assert torch.equal(ours(own, CAT, scheduler=scheduler, guidance_scale=5.0, controls=control), expected)


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_two_controls_over_a_batch_give_diffusers_latents_bit_for_bit(
    tiny_folder: Path, files: Path, scale: float, guess: bool
) -> None:
    own, reference = pipeline(tiny_folder, files), oracle(tiny_folder, files, StableDiffusionControlNetPipeline, NAMES)
    expected = theirs(
        own,
        reference,
        "ddim",
        CATS,
        scale=scale,
        image=[[Image.open(files / f"{name}.png") for name in "ab"]] * 2,  # each image's own
        controlnet_conditioning_scale=[0.5, 1.5],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.6, 1.0],
        guess_mode=guess,
    )
    controls = [f"{files}/one={files}/a.png:0.5@0-0.6", f"{files}/two={files}/b.png:1.5@0.4-1"]
    got = ours(own, scheduler="ddim", guidance_scale=scale, controls=controls, guess_mode=guess or None)
    assert torch.equal(got, expected)


def test_a_control_of_a_start_image_gives_diffusers_latents_bit_for_bit(tiny_folder: Path, files: Path) -> None:
    own = pipeline(tiny_folder, files)
    reference = oracle(tiny_folder, files, StableDiffusionControlNetImg2ImgPipeline, ("one",))
    start, seen = Image.open(files / "start.png"), Image.open(files / "a.png")
    given = {"image": start, "control_image": seen, "strength": 0.6, "control_guidance_end": 0.5}
    expected = theirs(own, reference, "euler", CAT, scale=5.0, controlnet_conditioning_scale=1.0, **given)
    fields = {"init_image": f"{files}/start.png", "strength": 0.6, "controls": f"{files}/one={files}/a.png@-0.5"}
    assert torch.equal(ours(own, CAT, scheduler="euler", guidance_scale=5.0, **fields), expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_control_behind_a_mask_gives_diffusers_latents_bit_for_bit(
    tiny_folder: Path, files: Path, tmp_path: Path, channels: int
) -> None:
    model = tiny_folder if channels == 4 else save_tiny_pipeline(tmp_path / "inpainting", in_channels=9)
    own = pipeline(model, files)
    reference = oracle(model, files, StableDiffusionControlNetInpaintPipeline, ("one",))
    expected = theirs(
        own,
        reference,
        "ddim",
        CAT,
        scale=5.0,
        image=Image.open(files / "start.png"),
        mask_image=Image.open(files / "mask.png"),
        control_image=Image.open(files / "a.png"),
        strength=1.0,
        controlnet_conditioning_scale=1.0,
        width=64,
        height=48,
    )
    given = {"init_image": f"{files}/start.png", "mask": f"{files}/mask.png", "controls": f"{files}/one={files}/a.png"}
    got = ours(own, CAT, scheduler="ddim", guidance_scale=5.0, **given)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_control_of_sdxl_gives_diffusers_latents_bit_for_bit(files: Path, tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "sdxl")
    model = load_model(spec_of_folder(folder), dtype="float32", device="cpu")
    net = str(save_tiny_controlnet(tmp_path / "net", folder))
    registry = load_registry()
    own = Pipeline.of(with_controlnets(model, {net: load_controlnet(registry.find_controlnet(net), model)}))
    plain = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    projection = plain.text_encoder_2.text_projection.weight  # see tests/models/families/test_sdxl.py
    projection.data = projection.data.clone()
    reference = StableDiffusionXLControlNetPipeline(**plain.components, controlnet=ControlNetModel.from_pretrained(net))
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = make_scheduler("euler", model.scheduler_config)
    expected = reference(
        "a cat",
        negative_prompt="a dog",
        image=Image.open(files / "a.png"),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        controlnet_conditioning_scale=0.7,
        control_guidance_end=0.6,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    given = {"scheduler": "euler", "guidance_scale": 5.0, "negative_prompt": "a dog"}
    got = ours(own, CAT, controls=f"{net}={files}/a.png:0.7@0-0.6", **given)
    assert torch.equal(got, expected)
    with pytest.raises(UsageError, match="does not fit"):
        load_controlnet(registry.find_controlnet(str(files / "one")), model)


def test_a_control_of_a_distilled_model_gives_diffusers_latents(files: Path, tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "lcm", time_cond_proj_dim=32)
    own, reference = pipeline(model, files), oracle(model, files, StableDiffusionControlNetPipeline, ("one",))
    reference.scheduler = make_scheduler("lcm", own.model.scheduler_config)
    expected = reference(
        "a cat",
        image=Image.open(files / "a.png"),
        num_inference_steps=STEPS,
        guidance_scale=8.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    got = ours(own, CAT, scheduler="lcm", guidance_scale=8.0, controls=f"{files}/one={files}/a.png")
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler"])
@pytest.mark.parametrize("guess", [None, True])
def test_a_control_keeps_its_steps_when_the_prompt_changes_or_is_composed(
    tiny_folder: Path, files: Path, scheduler: str, guess: bool | None
) -> None:
    own, control = pipeline(tiny_folder, files), f"{files}/one={files}/a.png@0.2-0.7"
    given = {"scheduler": scheduler, "controls": control, "guess_mode": guess, "guidance_scale": 5.0}
    plain = ours(own, CAT, **given)
    assert not torch.equal(ours(own, CAT, pag_scale=2.0, **given), plain)
    assert torch.equal(ours(own, prompts("[a cat:a cat:0.5]", seeds=(7,)), **given), plain)
    composed = ours(own, prompts("a cat AND a dog:0", seeds=(7,)), **given)
    assert torch.allclose(composed, plain, rtol=1e-3, atol=1e-3)


def test_a_network_with_zero_convolutions_changes_nothing(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    model = load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu")
    ControlNetModel.from_unet(model.unet).save_pretrained(tmp_path / "new")
    new = load_controlnet(load_registry().find_controlnet(str(tmp_path / "new")), model)
    own = Pipeline.of(with_controlnets(model, {str(tmp_path / "new"): new}))
    assert torch.equal(ours(own, controls=f"{tmp_path}/new={files}/a.png"), ours(own))


def test_a_second_pass_sees_the_map_at_its_own_size(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = pipeline(tiny_folder, files)
    network, sizes = own.model.parts[f"controlnet:{files}/one"], []
    forward = network.forward

    def watched(*args: Any, controlnet_cond: Tensor, **rest: Any) -> Any:
        sizes.append(tuple(controlnet_cond.shape[-2:]))
        return forward(*args, controlnet_cond=controlnet_cond, **rest)

    monkeypatch.setattr(network, "forward", watched)
    found = ours(own, CAT, controls=f"canny:{files}/one={files}/a.png", upscale="2x:0.5")
    assert found.shape[-2:] == (12, 16)
    assert list(dict.fromkeys(sizes)) == [(48, 64), (96, 128)]


def test_perturbed_attention_asks_no_control_again(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = pipeline(tiny_folder, files), []
    network = own.model.parts[f"controlnet:{files}/one"]
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *given, **rest: calls.append(1) or forward(*given, **rest))
    ours(own, CAT, controls=f"{files}/one={files}/a.png", pag_scale=2.0, scheduler="euler")
    assert len(calls) == STEPS


def test_each_image_of_a_batch_has_its_own_map(tiny_folder: Path, files: Path) -> None:
    own = pipeline(tiny_folder, files)
    requests = [resolved(own, controls=f"{files}/one={files}/{name}.png") for name in "ab"]
    jobs = [ResolvedJob(n, request, own.model.spec) for n, request in enumerate(requests)]
    assert len(plan(jobs, Limits(2))) == 1
    together = generate_images(own, requests, batch_size=2)
    for n, request in enumerate(requests):
        company = generate_images(own, [request, request], batch_size=2)[0]
        assert (together[n].pixels - company.pixels).abs().max() < 2 / 255
    assert not torch.equal(together[0].pixels, together[1].pixels)


# Files


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A model of two layers a block, as the original names need it, and a ControlNet for it."""
    folder = tmp_path_factory.mktemp("two-layers")
    model = load_model(spec_of_folder(save_tiny_pipeline(folder / "model", layers_per_block=2)), dtype="float32")
    return model, save_tiny_controlnet(folder / "net", folder / "model")


@pytest.mark.parametrize("names", ["diffusers", "original", "original, without a prefix"])
def test_a_single_file_holds_the_same_network_as_a_folder(
    two_layers: tuple[LoadedModel, Path], tmp_path: Path, names: str
) -> None:
    model, folder = two_layers
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    stored = tensors if names == "diffusers" else ldm_controlnet(tensors)
    if names.endswith("prefix"):
        stored = {name.removeprefix("control_model."): tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "net.safetensors")
    single = load_controlnet(load_registry().find_controlnet(str(tmp_path / "net.safetensors")), model)
    assert all(torch.equal(tensors[name], one) for name, one in single.network.state_dict().items())
    whole = load_controlnet(load_registry().find_controlnet(str(folder)), model)
    extra = {"_class_name": "", "_diffusers_version": "", "_name_or_path": "", "_use_default_values": []}
    assert {**single.network.config, **extra} == {**whole.network.config, **extra}
    assert single.identity.result().startswith("sha256:")


WRONG_SHAPES = [
    ({"cross_attention_dim": 48}, "made for text states of 48 numbers, and the model has text states of 32 numbers"),
    ({"block_out_channels": [32, 32]}, r"made for blocks of \[32, 32\] channels"),
    ({"layers_per_block": 2}, "made for 2 layers a block"),
    ({"in_channels": 9}, "takes latents of 9 channels, and .* has 4"),
    ({"conditioning_channels": 1}, "takes maps of 1 channels, not RGB"),
    ({"conditioning_embedding_out_channels": [8, 8, 16]}, "latent cells of 4 pixels"),
    ({"addition_embed_type": "text_time"}, "a further condition 'text_time'"),
    ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, and no ControlNet"),
]


@pytest.mark.parametrize(("changes", "problem"), WRONG_SHAPES)
def test_a_network_of_another_shape_is_told(
    tiny_folder: Path, files: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    config = json.loads((files / "one" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UsageError, match=problem):
        load_controlnet(load_registry().find_controlnet(str(tmp_path)), loaded(tiny_folder, files))


def test_broken_networks_are_told_apart(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    model, registry = loaded(tiny_folder, files), load_registry()

    def load(name: str) -> Any:
        return load_controlnet(registry.find_controlnet(str(tmp_path / name)), model)

    whole = (files / "one" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name in ("cut", "pickled", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((files / "one" / "config.json").read_bytes())
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(whole[:5000])
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}.")
    (tmp_path / "net.pth").write_bytes(b"\x80\x02}.")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    other = load_file(files / "one" / "diffusion_pytorch_model.safetensors")
    save_file({**other, "conv_in.weight": torch.zeros(32, 4, 1, 1)}, tmp_path / "odd.safetensors")
    for name, kind, problem in (
        ("cut", BadWeights, "is cut short"),
        ("pickled", BadWeights, "is a pickle"),
        ("bare", BadWeights, "has no weights"),
        ("net.pth", UsageError, "is a pickle"),
        ("lora.safetensors", BadWeights, "is not a ControlNet"),
        ("odd.safetensors", BadWeights, "conv_in.weight has shape"),
        ("none", NotFound, "no such file or folder"),
    ):
        with pytest.raises(kind, match=problem):
            load(name)
    with pytest.raises(NotFound, match="has no config"):
        registry.find_controlnet(str(tmp_path))


def test_names_come_from_the_models_file_and_paths_count_from_its_folder(
    tiny_folder: Path, files: Path, tmp_path: Path
) -> None:
    own = tmp_path / "models.yaml"
    relative = os.path.relpath(files, tmp_path)
    own.write_text(f"controlnets:\n  edges: {{source: {{kind: folder, path: {relative}/one}}}}\n")
    registry = load_registry(own)
    assert load_controlnet(registry.find_controlnet("edges"), loaded(tiny_folder, files))
    with pytest.raises(NotFound, match="did you mean 'edges'"):
        registry.find_controlnet("edgse")
    with pytest.raises(
        Offline, match=r"ControlNet 'canny' is not in the cache .* `sdcli models pull canny` \(723 MB\)"
    ):
        load_controlnet(registry.find_controlnet("canny"), loaded(tiny_folder, files))
    own.write_text("controlnets:\n  edges: {source: {kind: random, seed: 1}}\n")
    with pytest.raises(UsageError, match=r"models\.yaml: controlnets\.edges\.source"):
        load_registry(own)


# What is asked


SPELLED = [
    ("canny=e.png", {"model": "canny"}),
    ("canny:canny=photo.jpg:0.5", {"model": "canny", "preprocessor": "canny", "weight": 0.5}),
    ("a/b=c:0.8@0.1-0.5", {"model": "a/b", "weight": 0.8, "start": 0.1, "end": 0.5}),
    ("C:\\net=C:\\map.png@-0.5", {"model": "C:\\net", "end": 0.5}),
    ("m=a=b@c.png@0.5-", {"start": 0.5}),
    ("none:canny:x=-", {"model": "canny:x"}),
    ("m=x:2:1", {"weight": 1.0}),
]


@pytest.mark.parametrize(("text", "fields"), SPELLED)
def test_a_spelling_means_the_same_when_it_is_written_again(text: str, fields: dict[str, Any]) -> None:
    (control,) = parse_request({"controls": text}).controls
    assert control.model_dump(include=set(fields)) == fields
    assert Control.model_validate(str(control)) == control


REFUSED = [
    ({"controls": "one"}, UsageError, "controls.0: is written as MODEL=IMAGE"),
    ({"controls": "one=a.png:0"}, UsageError, "one has no effect at weight 0"),
    ({"controls": "one=a.png:-1"}, UsageError, "weight: should be greater than or equal to 0"),
    ({"controls": "one=a.png@0.8-0.2"}, UsageError, "one should end after it starts, not 0.8-0.2"),
    ({"controls": "one=a.png@0-2"}, UsageError, "end: should be less than or equal to 1"),
    ({"controls": "one=a.png@0.45-0.55"}, UsageError, "0.45-0.55 of 5 steps leaves one no step"),
    ({"controls": "one=a.png@0.28-0.45"}, UsageError, "0.28-0.45 of 5 steps leaves one no step"),
    ({"guess_mode": True}, UsageError, "--guess-mode has no effect without --control"),
    ({"controls": "one=none.png"}, NotFound, "no file none.png"),
]


@pytest.mark.parametrize(("fields", "kind", "problem"), REFUSED)
def test_what_would_have_no_effect_is_refused(
    tiny_folder: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    kind: type[SdcliError],
    problem: str,
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(kind, match=problem):
        resolved(pipeline(tiny_folder, files), **fields)


def test_lines_of_a_prompt_file_may_have_several_controls(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    (tmp_path / "jobs.txt").write_text(
        "a cat --control one=a.png --control two=b.png:0.5\na dog --control three=a.png\n"
    )
    lines = read_lines(str(tmp_path / "jobs.txt"))
    good, bad = expand(lines, {"model": "tiny"}, load_registry(), num_images=1, base_seed=0)
    assert isinstance(good, ResolvedJob)
    assert [(one.model, one.weight) for one in good.request.controls] == [("one", 1.0), ("two", 0.5)]
    assert isinstance(bad, BadJob)
    assert "line 2: no ControlNet 'three'" in str(bad.error)


def test_an_image_that_cannot_be_read_fails_alone(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((files / "a.png").read_bytes()[:200])
    with pytest.raises(BadImage, match=r"cut\.png"):
        ours(pipeline(tiny_folder, files), controls=f"{files}/one={tmp_path}/cut.png")


def test_another_image_under_the_same_name_is_not_painted_from(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    own, path = pipeline(tiny_folder, files), tmp_path / "map.png"
    Image.new("RGB", (64, 48), "red").save(path)
    request = resolved(own, controls=f"{files}/one={path}")
    assert parse_request(request.typed()).typed() == request.typed()
    Image.new("RGB", (64, 48), "blue").save(path)
    with pytest.raises(UsageError, match=r"map\.png is another file than the one that was generated with"):
        next(sample(own, [request]))


def test_the_cache_keeps_controlnets_that_the_next_job_needs_and_drops_the_others(
    tiny_folder: Path, files: Path
) -> None:
    cache = cache_of()
    asked = {name: GenerationRequest(model=str(tiny_folder), controls=(f"{files}/{name}=x",)) for name in NAMES}  # type: ignore[arg-type]
    both = asked["one"].model_copy(update={"controls": asked["one"].controls + asked["two"].controls})
    first = pipeline_for(cache, asked["one"]).model.parts
    second = pipeline_for(cache, both).model.parts
    third = pipeline_for(cache, asked["two"]).model.parts
    one, two = (f"controlnet:{files}/{name}" for name in NAMES)
    assert second[one] is first[one]
    assert third[two] is second[two]
    assert one not in third
    assert not [
        name for name in pipeline_for(cache, GenerationRequest(model=str(tiny_folder))).model.parts if ":" in name
    ]


@pytest.mark.slow
def test_a_painted_control_is_recorded_and_verified(tiny_folder: Path, files: Path, tmp_path: Path, sdcli: Any) -> None:
    control = f"canny:{files}/one={files}/a.png:0.8@0-0.5"
    line = ["generate", "a cat", "-m", tiny_folder, "--steps", "3", "--seed", "5", "--size", "64x48", "--guess-mode"]
    done = sdcli(*line, "--control", control, "-o", "a.png", "-q", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    weights = json.loads(Image.open(tmp_path / "a.png").text["sdcli"])["provenance"]["weights"]  # type: ignore[attr-defined]
    assert weights[f"controlnet:{files}/one"].startswith("sha256:")
    assert verify_image(tmp_path / "a.png", load_registry(), RunSettings(device="cpu")).identical


# Maps


def test_each_preprocessor_has_a_map_of_the_asked_size() -> None:
    assert set(PREPROCESSORS) == set(get_args(Preprocessor))
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    for name in get_args(Preprocessor):
        for image in (Image.fromarray(noise), Image.new("RGB", (1, 1)), Image.new("RGB", (9, 3000), "white")):
            for size in ((64, 48), (8, 8)):
                made = control_map(image, name, size)
                assert (made.size, made.mode) == (size, "RGB")
                assert made.tobytes() == control_map(image, name, size).tobytes()


def square() -> Image.Image:
    """A light square on a dark ground, with noise on it."""
    levels = np.full((96, 128), 60.0)
    levels[24:72, 32:96] = 200
    levels += np.random.default_rng(0).normal(0, 3, levels.shape)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def test_canny_draws_one_closed_thin_line_around_a_square() -> None:
    edges = np.asarray(control_map(square(), "canny", (128, 96)))[..., 0] > 0
    rows, columns = np.nonzero(edges)
    near = np.zeros_like(edges)
    near[22:74, 30:98] = True
    near[26:70, 34:94] = False
    assert near[rows, columns].all()
    middle = edges[40:56], edges[:, 48:80].T
    for lines in middle:
        assert (lines.sum(axis=1) == 2).all()  # thin, and without a gap


def test_maps_say_what_they_should() -> None:
    image = square()
    maps = {name: np.asarray(control_map(image, name, (128, 96))).astype(float) for name in PREPROCESSORS}
    flat = Image.new("RGB", (64, 64), (10, 200, 30))
    for name in ("canny", "scribble", "softedge", "depth"):
        assert not np.asarray(control_map(flat, name, (64, 64))).any()
    for name in ("blur", "tile", "palette"):
        assert np.asarray(control_map(flat, name, (64, 64))).tobytes() == flat.tobytes()
    assert np.abs(maps["none"] - np.asarray(image)).max() == 0
    assert (maps["scribble"] > 0).sum() > 2 * (maps["canny"] > 0).sum()
    assert maps["softedge"][48, 31:33].min() > 4 * maps["softedge"][48, 64].max()
    assert len(np.unique(maps["palette"].reshape(-1, 3), axis=0)) <= 8 * 11
    assert (maps["depth"].min(), maps["depth"].max()) == (0, 255)
    for name in ("blur", "tile"):
        assert np.abs(np.diff(maps[name], axis=1)).max() < np.abs(np.diff(maps["none"], axis=1)).max() / 2


def test_a_saved_map_paints_as_the_image_it_was_made_of(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    save_map("canny", str(files / "a.png"), tmp_path / "edges.png", size="64x48")
    own = pipeline(tiny_folder, files)
    drawn = ours(own, CAT, controls=f"canny:{files}/one={files}/a.png")
    assert torch.equal(ours(own, CAT, controls=f"{files}/one={tmp_path}/edges.png"), drawn)
    with pytest.raises(AlreadyExists):
        save_map("canny", str(files / "a.png"), tmp_path / "edges.png")
    with pytest.raises(UsageError, match="should end in"):
        save_map("canny", str(files / "a.png"), tmp_path / "edges.jpg")
