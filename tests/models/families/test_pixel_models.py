"""Models without a prompt, with classes, and without a VAE: generated as diffusers does, through the one reference."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor

from sdcli.diffusion import init_latents
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.errors import BadOutput, BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.events import Result
from sdcli.generation.journal import Journal
from sdcli.generation.loaded_vae import LoadedVae
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.images.pixels import from_pixels
from sdcli.metadata.read import read_image
from sdcli.models.families import pipelines
from sdcli.models.loaded_model import LoadedModel, model_in_memory
from sdcli.models.loader import load_model
from sdcli.models.registry import ModelSpec, load_registry, spec_of_folder
from sdcli.models.sources import FolderSource
from sdcli.request.jobs import read_lines
from sdcli.request.schema import GenerationRequest
from sdcli.training.evaluation import evaluating
from tests.cli.test_startup import run
from tests.conftest import Run
from tests.oracle import latents, load_pipeline, prompts, requests_of
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.service import generate_files, generate_images, results
from tests.tiny import with_parts

NO_PROMPTS = prompts("", "")
SEEDS = NO_PROMPTS.seeds
ANIMALS = ["cat", "dog", "red fox"]


def micro_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        **{
            "sample_size": 28,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            **changes,
        }
    )
    return unet.eval()


def micro_vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    depth = len(changes.setdefault("block_out_channels", (8, 8, 16, 16)))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        norm_num_groups=4,
        **changes,
    )
    return vae.eval()


def save_pixel_model(folder: Path, *, classes: list[str] | None = None, **unet: Any) -> Path:
    DDPMPipeline(micro_unet(**unet), DDPMScheduler()).save_pretrained(folder)
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One micro model of every kind."""
    root = tmp_path_factory.mktemp("models")
    grey = save_pixel_model(root / "grey")
    colour = save_pixel_model(root / "colour", in_channels=3, out_channels=3, sample_size=32)
    digits = save_pixel_model(root / "digits", sample_size=8)
    save_pixel_model(root / "animals", classes=ANIMALS, num_class_embeds=4)
    save_pixel_model(root / "strict", classes=ANIMALS, num_class_embeds=3)
    save_pixel_model(root / "numbers", num_class_embeds=30)
    latent = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(micro_vae(), micro_unet(**latent), scheduler).save_pretrained(root / "latents")
    LDMPipeline(micro_vae(), micro_unet(**latent, num_class_embeds=4), scheduler).save_pretrained(
        root / "latent-animals"
    )
    (root / "latent-animals" / "classes.json").write_text(json.dumps(ANIMALS))
    assert {grey.name, colour.name, digits.name} < {path.name for path in root.iterdir()}
    return {path.name: path for path in root.iterdir()}


@torch.inference_mode()
def by_hand(
    unet: UNet2DModel, scheduler: Any, *, steps: int, size: tuple[int, int], labels: Any = None, scale: float = 1.0
) -> Tensor:
    """diffusers' parts in the plainest loop; `labels` are (unconditional, conditional) rows."""
    own = NO_PROMPTS.generators()
    x = torch.cat([torch.randn((1, unet.config.in_channels, *size), generator=generator) for generator in own])
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    extra = {"generator": own} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        if labels is None:
            output = unet(scaled, t).sample
        elif scale > 1:
            rows = unet(torch.cat([scaled, scaled]), t, class_labels=torch.tensor([*labels[0], *labels[1]])).sample
            without, with_class = rows.chunk(2)
            output = without + scale * (with_class - without)
        else:
            output = unet(scaled, t, class_labels=torch.tensor(labels[1])).sample
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


# The oracle: diffusers


@pytest.mark.parametrize("name", ["grey", "colour", "digits"])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_pixels_equal_diffusers_own_pipelines_bit_for_bit(folders: dict[str, Path], name: str, scheduler: str) -> None:
    oracle = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}[scheduler].from_pretrained(folders[name])
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(batch_size=2, generator=NO_PROMPTS.generators(), num_inference_steps=4, output_type="pt").images
    pipeline = load_pipeline(folders[name])
    x = latents(pipeline, NO_PROMPTS, scheduler=scheduler, steps=4)
    assert x.shape == expected.shape
    found = torch.cat([pipeline.space.decode(one[None]) for one in x])
    assert torch.equal(found, expected.expand(-1, 3, -1, -1))


def test_ddim_eta_equals_diffusers_own_pipeline(folders: dict[str, Path]) -> None:
    oracle = DDIMPipeline.from_pretrained(folders["grey"])
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(
        batch_size=2, generator=NO_PROMPTS.generators(), eta=0.7, num_inference_steps=4, output_type="pt"
    ).images
    found = latents(load_pipeline(folders["grey"]), NO_PROMPTS, scheduler="ddim", steps=4, eta=0.7)
    assert torch.equal((found / 2 + 0.5).clamp(0, 1), expected)


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
def test_x_equals_a_plain_loop_of_diffusers_parts_with_every_scheduler(
    folders: dict[str, Path], scheduler: str
) -> None:
    pipeline = load_pipeline(folders["grey"])
    unet = UNet2DModel.from_pretrained(folders["grey"] / "unet")
    expected = by_hand(unet, make_scheduler(scheduler, pipeline.model.scheduler_config), steps=4, size=(20, 36))
    assert torch.equal(latents(pipeline, NO_PROMPTS, scheduler=scheduler, steps=4, width=36, height=20), expected)


@pytest.mark.parametrize(
    ("negatives", "scale", "labels"),
    [
        (("", ""), 1.0, ((3, 3), (2, 0))),
        (("", ""), 3.0, ((3, 3), (2, 0))),
        (("dog", ""), 3.0, ((1, 3), (2, 0))),
    ],
)
def test_guidance_by_classes_equals_a_plain_loop(
    folders: dict[str, Path], negatives: tuple[str, str], scale: float, labels: Any
) -> None:
    pipeline = load_pipeline(folders["animals"])
    requests = [
        resolve(
            GenerationRequest(
                prompt=prompt, negative_prompt=negative, seed=seed, guidance_scale=scale, steps=3, scheduler="ddpm"
            ),
            pipeline.model.spec,
        )
        for prompt, negative, seed in zip(["red fox", "0"], negatives, SEEDS, strict=True)
    ]
    *_, last = sample(pipeline, requests)
    unet = UNet2DModel.from_pretrained(folders["animals"] / "unet")
    scheduler = DDPMScheduler.from_pretrained(folders["animals"] / "scheduler")
    assert torch.equal(last.latents, by_hand(unet, scheduler, steps=3, size=(28, 28), labels=labels, scale=scale))


def test_images_of_latents_equal_diffusers_own_pipeline(folders: dict[str, Path]) -> None:
    """diffusers loads an AutoencoderKL as LDMPipeline's `vqvae`, and so do we."""
    oracle = LDMPipeline.from_pretrained(folders["latents"])
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(batch_size=2, generator=NO_PROMPTS.generators(), num_inference_steps=4, output_type="np").images
    pipeline = load_pipeline(folders["latents"])
    x = latents(pipeline, NO_PROMPTS, steps=4)
    assert x.shape == (2, 4, 8, 8)
    with torch.inference_mode():
        together = pipeline.space.decode(x)
    assert np.array_equal(together.permute(0, 2, 3, 1).numpy(), expected)
    assert torch.allclose(pipeline.space.decode(x[:1])[0], together[0], atol=1e-5)


def test_latents_of_classes_are_guided_too(folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders["latent-animals"])
    unet = UNet2DModel.from_pretrained(folders["latent-animals"] / "unet")
    scheduler = DDIMScheduler.from_pretrained(folders["latent-animals"] / "scheduler")
    expected = by_hand(unet, scheduler, steps=3, size=(8, 8), labels=((3, 3), (0, 1)), scale=2.0)
    assert torch.equal(latents(pipeline, prompts("cat", "dog"), steps=3, guidance_scale=2.0), expected)


# What may be asked


def test_the_model_s_own_size_is_the_default(folders: dict[str, Path], tiny_folder: Path) -> None:
    sizes = {name: spec_of_folder(folder).defaults for name, folder in folders.items()}
    assert {name: (size.width, size.height) for name, size in sizes.items()} == {
        "grey": (28, 28), "colour": (32, 32), "digits": (8, 8), "animals": (28, 28), "strict": (28, 28),
        "numbers": (28, 28), "latents": (64, 64), "latent-animals": (64, 64),
    }  # fmt: skip
    assert {(d.steps, d.guidance_scale, d.scheduler) for d in sizes.values()} == {(50, 1.0, "ddim")}
    text = spec_of_folder(tiny_folder).defaults
    assert (text.width, text.height, text.steps, text.guidance_scale) == (64, 64, 25, 7.5)


def test_an_oblong_model_paints_oblong_images(tmp_path: Path) -> None:
    spec = spec_of_folder(save_pixel_model(tmp_path / "oblong", sample_size=(12, 20)))
    assert (spec.defaults.width, spec.defaults.height) == (20, 12)


def test_a_vae_that_halves_twice_makes_images_of_four_pixels_a_cell(tmp_path: Path) -> None:
    latent = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
    vae = micro_vae(block_out_channels=(8, 8, 16))
    LDMPipeline(vae, micro_unet(**latent), DDIMScheduler()).save_pretrained(tmp_path / "small")
    pipeline = load_pipeline(tmp_path / "small")
    x = latents(pipeline, NO_PROMPTS, steps=2)
    assert x.shape == (2, 4, 8, 8)
    assert pipeline.space.decode(x).shape[1:] == (3, 32, 32)
    assert pipeline.model.spec.kind.size_step == 8


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("grey", {"width": 29}, "width: should be a multiple of 2, not 29"),
        ("latents", {"height": 72}, "height: should be a multiple of 16, not 72"),
        ("grey", {"prompt": "a cat"}, "generates without a prompt; 'a cat' would have no effect"),
        ("grey", {"negative_prompt": "a cat"}, "generates without a prompt"),
        ("grey", {"prompt_template": "{prompt} in oil"}, "generates without a prompt"),
        ("grey", {"guidance_scale": 3}, "generates without a prompt, so it cannot be guided"),
        ("grey", {"eta": 0.5, "scheduler": "euler"}, "eta has no effect"),
        (
            "strict",
            {"prompt": "cat", "guidance_scale": 2},
            "always generates a class, never none, so it cannot be guided",
        ),
        ("strict", {"prompt": "cat", "negative_prompt": "dog"}, "cannot be guided"),
        ("strict", {"prompt": ""}, r"the prompt names no class \(the model's classes: cat, dog, red fox\)"),
        ("animals", {"prompt": "red fax"}, "no class 'red fax'; did you mean 'red fox'"),
        ("animals", {"prompt": "3"}, "no class '3'"),
        ("animals", {"prompt": "-1"}, "no class '-1'"),
        ("animals", {"prompt": "cat", "negative_prompt": "dog"}, "no effect at guidance scale 1; use one above 1"),
        ("animals", {"prompt": "cat", "negative_prompt": "x", "guidance_scale": 2}, "no class 'x'"),
        ("numbers", {"prompt": "30"}, "0, 1, 2, 3, .*, 19 and 10 more"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_anything_is_loaded(
    folders: dict[str, Path], name: str, fields: dict[str, Any], sentence: str
) -> None:
    spec = spec_of_folder(folders[name])
    with pytest.raises(UsageError, match=sentence):
        resolve(GenerationRequest(**fields), spec)


def test_a_class_is_asked_for_by_its_name_or_its_number() -> None:
    from sdcli.models.families.family import ModelKind

    kind = ModelKind(classes=("2", "cat", "dog"), null_label=3)
    assert [kind.label(prompt) for prompt in ("cat", " cat ", "dog", "1", "0", "")] == [1, 1, 2, 1, 0, 3]
    assert kind.label("2") == 0, "a name goes before a number"


def test_more_steps_than_levels_of_noise_are_refused(tmp_path: Path) -> None:
    DDPMPipeline(micro_unet(), DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "short")
    pipeline = load_pipeline(tmp_path / "short")
    assert latents(pipeline, NO_PROMPTS, steps=10).isfinite().all()
    with pytest.raises(UsageError, match=r"11 steps are too many: .* was trained with 10 noise levels"):
        latents(pipeline, NO_PROMPTS, steps=11)


def test_a_black_image_of_pixels_is_an_image_and_nan_is_none(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(folders["grey"])
    (request, _) = requests_of(pipeline, NO_PROMPTS, steps=1)
    for value, ends in ((-1.0, "painted"), (float("nan"), "refused")):
        monkeypatch.setattr(init_latents, "initial_noise", lambda _, shape, value=value: torch.full((1, *shape), value))
        monkeypatch.setattr(type(pipeline.model.unet), "forward", lambda *_, **__: (torch.zeros(1, 1, 28, 28),))
        if ends == "painted":
            (image,) = generate_images(pipeline, [request])
            assert float(image.pixels.max()) < 0.5
        else:
            with pytest.raises(BadOutput):
                generate_images(pipeline, [request])


# Networks in memory


def in_memory(folder: Path, **changes: Any) -> LoadedModel:
    return model_in_memory(
        ModelSpec(name="a run", source=FolderSource(kind="folder", path=folder)),
        scheduler_config=DDPMScheduler().config,
        unet=micro_unet(**changes),
    )


def test_networks_in_memory_paint_what_their_folder_paints(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline, trained = load_pipeline(folders["grey"]), Pipeline.of(in_memory(tmp_path / "not there yet"))
    fields = {"steps": 3, "scheduler": "ddpm", "width": 28, "height": 28, "guidance_scale": 1}
    ours = generate_images(trained, requests_of(trained, NO_PROMPTS, **fields))
    theirs = generate_images(pipeline, requests_of(pipeline, NO_PROMPTS, **fields))
    assert [image.batch_size for image in ours] == [2, 2]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))
    assert trained.model.weights() == {"unet": "memory"}
    assert list(tmp_path.iterdir()) == []


def test_classes_and_latents_of_networks_in_memory_are_read_off_their_configurations() -> None:
    model = model_in_memory(
        ModelSpec(name="a run", source=FolderSource(kind="folder", path=Path("nowhere"))),
        scheduler_config=DDIMScheduler(clip_sample=False).config,
        classes=ANIMALS,
        unet=micro_unet(in_channels=4, out_channels=4, num_class_embeds=4),
        vae=micro_vae(),
    )
    pipeline = Pipeline.of(model)
    fields = {"steps": 2, "width": 64, "height": 32, "guidance_scale": 2, "scheduler": "ddim"}
    first, second = generate_images(pipeline, requests_of(pipeline, prompts("cat", "dog"), **fields), batch_size=1)
    assert first.pixels.shape == (3, 32, 64)
    assert (first.batch_size, second.batch_index) == (1, 0)
    with pytest.raises(BadWeights, match="names 2 classes, and its UNet has 4"):
        model_in_memory(model.spec, scheduler_config={}, classes=["a", "b"], unet=micro_unet(num_class_embeds=4))


def test_a_part_in_memory_takes_the_place_of_the_loaded_one(folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders["grey"])
    other = micro_unet()
    for parameter in other.parameters():
        parameter.data *= 1.5
    trained = Pipeline.of(with_parts(pipeline.model, unet=other, identity="a run, step 7"))
    assert not torch.equal(latents(pipeline, NO_PROMPTS, steps=2), latents(trained, NO_PROMPTS, steps=2))
    assert trained.model.identity("unet") == "a run, step 7"
    assert pipeline.model.identity("unet").startswith("sha256:")


def test_text_models_paint_with_a_trained_unet_as_well(tiny_folder: Path) -> None:
    import copy

    model = load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu")
    same = Pipeline.of(with_parts(model, unet=copy.deepcopy(model.unet)))
    requests = requests_of(same, prompts("a cat", "a dog"), steps=2)
    pairs = zip(generate_images(Pipeline.of(model), requests), generate_images(same, requests), strict=True)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in pairs)


def test_dropout_is_off_while_sample_images_are_painted_and_on_again_after(tmp_path: Path) -> None:
    model = in_memory(tmp_path, dropout=0.5)
    pipeline = Pipeline.of(model)
    request = requests_of(pipeline, NO_PROMPTS, steps=2, width=28, height=28, guidance_scale=1)[:1]
    expected = generate_images(pipeline, request)[0].pixels
    model.unet.train()
    model.unet.mid_block.eval()
    modes = [module.training for module in model.unet.modules()]
    with evaluating(model.parts.values()):
        assert torch.equal(generate_images(pipeline, request)[0].pixels, expected)
    assert [module.training for module in model.unet.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.unet.parameters()), "training goes on"


def test_training_goes_on_after_painting(tmp_path: Path) -> None:
    pipeline = Pipeline.of(in_memory(tmp_path))
    generate_images(pipeline, requests_of(pipeline, NO_PROMPTS, steps=1, width=28, height=28, guidance_scale=1))
    loss = pipeline.model.unet(torch.zeros(1, 1, 28, 28), 3).sample.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in pipeline.model.unet.parameters())


# Folders


def damaged(source: Path, target: Path, file: str, text: str) -> Path:
    shutil.copytree(source, target)
    (target / file).write_text(text)
    return target


def unet_config(**changes: Any) -> str:
    return json.dumps({**micro_unet().config, "_class_name": "UNet2DModel", **changes})


@pytest.mark.parametrize(
    ("file", "text", "error", "sentence"),
    [
        ("sdcli.json", '{"schema": 2}', UsageError, "schema: 2 is not 1"),
        ("sdcli.json", "{}", UsageError, "schema: None is not 1"),
        ("sdcli.json", '{"schema": true}', UsageError, "schema: True is not 1"),
        ("sdcli.json", '{"schema": 1, "default": {}}', UsageError, "unknown key 'default'"),
        ("sdcli.json", '{"schema": 1, "defaults": []}', UsageError, "defaults: should be an object"),
        ("sdcli.json", '{"schema": 1, "defaults": {"colour": 1}}', UsageError, "defaults.colour"),
        ("sdcli.json", '{"schema": 1, "defaults": {"steps": "many"}}', UsageError, "defaults.steps"),
        ("sdcli.json", '{"schema": 1, "defaults": {"steps": 1e9}}', UsageError, "defaults.steps"),
        ("sdcli.json", '{"schema": 1, "defaults": {"guidance_scale": NaN}}', UsageError, "defaults.guidance_scale"),
        ("sdcli.json", '{"schema": 1, "defaults": {"guidance_scale": Infinity}}', UsageError, "defaults.guidance"),
        ("sdcli.json", '{"schema": 1, "defaults": {"scheduler": "eulr"}}', UsageError, "did you mean 'euler'"),
        ("sdcli.json", '{"schema": 1, "defaults": {"prompt_template": "x"}}', UsageError, "prompt_template: has no"),
        ("sdcli.json", '{"schema": 1, "defaults": {"width": 29}}', UsageError, "width: should be a multiple of 2"),
        ("sdcli.json", '{"schema": 1, "defaults": {"dtype": "int8"}}', UsageError, "defaults.dtype"),
        ("sdcli.json", "[" * 100_000, BadWeights, "cannot be read"),
        ("sdcli.json", " " * 2**21, BadWeights, "larger than any configuration"),
        ("sdcli.json", "[]", BadWeights, "should hold a JSON object"),
        ("classes.json", "{}", BadWeights, "should hold a JSON list"),
        ("classes.json", '["cat", "dog"]', BadWeights, "names 2 classes, and its UNet has 4"),
        ("classes.json", '["cat", "dog", 3]', BadWeights, "'3' cannot name a class"),
        ("classes.json", '["cat", "dog", ""]', BadWeights, "cannot name a class"),
        ("classes.json", '["cat", "dog", "\\u001b[2J"]', BadWeights, "cannot name a class"),
        ("classes.json", '["cat", "dog", "dog"]', BadWeights, "'dog' is there twice"),
        ("unet/config.json", unet_config(num_class_embeds=10**12), BadWeights, "cannot have 1000000000000 classes"),
        ("unet/config.json", unet_config(class_embed_type="timestep"), UsageError, "takes classes as 'timestep'"),
        ("unet/config.json", unet_config(in_channels=4, out_channels=4), UsageError, "takes 4 channels; images have"),
        ("unet/config.json", unet_config(out_channels=2), UsageError, "takes 1 channels and gives 2"),
        ("unet/config.json", unet_config(block_out_channels="many"), BadWeights, "describes no network"),
        ("unet/config.json", unet_config(_class_name="UNet2DConditionModel"), BadWeights, "is of a 'UNet2DCondition"),
        ("unet/config.json", unet_config(_class_name=["UNet2DModel"]), BadWeights, "is of a"),
        ("model_index.json", '{"_class_name": "DiTPipeline"}', UsageError, "is a DiTPipeline; sdcli generates with"),
        ("model_index.json", '{"_class_name": ["x"]}', UsageError, "sdcli generates with"),
        ("model_index.json", '{"_class_name": "DDPMPipeline"}', BadWeights, "names None as its unet"),
    ],
)  # fmt: skip
def test_hostile_folders_are_told_in_a_sentence(
    folders: dict[str, Path], tmp_path: Path, file: str, text: str, error: type[SdcliError], sentence: str
) -> None:
    folder = damaged(folders["animals"], tmp_path / "hostile", file, text)
    with pytest.raises(SdcliError) as refused:
        spec_of_folder(folder)
    assert type(refused.value) is error
    assert sentence in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_vq_model_is_told_from_a_vae(folders: dict[str, Path], tmp_path: Path) -> None:
    index = json.loads((folders["latents"] / "model_index.json").read_text())
    index["vqvae"] = ["diffusers", "VQModel"]
    folder = damaged(folders["latents"], tmp_path / "vq", "model_index.json", json.dumps(index))
    with pytest.raises(BadWeights, match="names 'VQModel' as its vqvae; known: AutoencoderKL, AutoencoderTiny"):
        spec_of_folder(folder)


def test_a_folder_that_is_incomplete_says_what_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["grey"], tmp_path / "half")
    (tmp_path / "half" / "unet" / "config.json").unlink()
    with pytest.raises(NotFound, match=r"unet/config\.json; the model is incomplete"):
        spec_of_folder(tmp_path / "half")


@pytest.mark.parametrize("sample_size", [0, -8, 10**9, True, "28", [28], [28, "28"], {"a": 1}, None])
def test_a_nonsensical_sample_size_is_passed_over(folders: dict[str, Path], tmp_path: Path, sample_size: Any) -> None:
    folder = damaged(folders["grey"], tmp_path / "odd", "unet/config.json", unet_config(sample_size=sample_size))
    defaults = spec_of_folder(folder).defaults
    assert (defaults.width, defaults.height) == (16, 16)


def test_a_folder_s_own_defaults_lie_between_the_usual_ones_and_those_of_an_entry(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    own = {"schema": 1, "defaults": {"steps": 7, "scheduler": "ddpm", "width": 16, "dtype": "float32"}}
    folder = damaged(folders["animals"], tmp_path / "run", "sdcli.json", json.dumps(own))
    defaults = spec_of_folder(folder).defaults
    assert (defaults.steps, defaults.scheduler, defaults.width, defaults.height) == (7, "ddpm", 16, 28)
    assert (defaults.guidance_scale, defaults.dtype) == (1.0, "float32")
    (tmp_path / "models.yaml").write_text(
        "models: {pets: {source: {kind: folder, path: run}, defaults: {steps: 3, height: 20}}}\n"
    )
    spec = load_registry(tmp_path / "models.yaml").find("pets")
    assert spec.kind.classes == tuple(ANIMALS)
    assert (spec.defaults.steps, spec.defaults.scheduler, spec.defaults.width, spec.defaults.height) == (
        3, "ddpm", 16, 20,
    )  # fmt: skip
    assert load_model(spec, device="cpu").spec == spec


def test_a_text_folder_may_have_its_own_defaults(tiny_folder: Path, tmp_path: Path) -> None:
    own = {"schema": 1, "defaults": {"prompt_template": "{prompt}, in oil", "guidance_scale": 3}}
    spec = spec_of_folder(damaged(tiny_folder, tmp_path / "run", "sdcli.json", json.dumps(own)))
    assert resolve(GenerationRequest(prompt="a cat"), spec).full_prompt == "a cat, in oil"
    assert (spec.defaults.guidance_scale, spec.defaults.width) == (3, 64)


@pytest.mark.parametrize("key", ["kind", "classes"])
def test_an_entry_of_models_yaml_cannot_claim_what_only_a_folder_says(tmp_path: Path, key: str) -> None:
    (tmp_path / "models.yaml").write_text(f"models: {{a: {{source: {{kind: hub, repo: a/b}}, {key}: [x]}}}}\n")
    with pytest.raises(UsageError, match=rf"models\.a\.{key}"):
        load_registry(tmp_path / "models.yaml")


@pytest.mark.parametrize(
    ("width", "sentence"),
    [(100, "should be a multiple of 8, not 100"), (8, "should be greater than or equal to 16, not 8")],
)
def test_an_entry_of_models_yaml_has_a_size_that_its_latents_can_have(
    tmp_path: Path, width: int, sentence: str
) -> None:
    (tmp_path / "models.yaml").write_text(
        f"models: {{a: {{source: {{kind: hub, repo: a/b}}, defaults: {{width: {width}}}}}}}\n"
    )
    with pytest.raises(UsageError, match=rf"models\.a\.defaults\.width: {sentence}"):
        load_registry(tmp_path / "models.yaml")


def test_every_layout_is_a_pipeline_of_diffusers() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in pipelines())


# As a user types it


@pytest.fixture
def command(sdcli: Run) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = sdcli("generate", *arguments, "--device", "cpu")
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


def test_an_unconditional_model_paints_without_a_prompt(
    command: Callable[..., Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    lines = command("-m", folders["grey"], "-n", "3", "--seed", "5", "--steps", "2", "--json").stdout.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [5, 6, 7]
    path = tmp_path / json.loads(lines[1])["path"]
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((28, 28), "RGB")
        red, green, blue = image.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes(), "grey is saved with equal channels"
    info = read_image(path)
    assert info.record is not None
    assert (info.record.request.prompt, info.record.request.width) == ("", 28)
    assert list(info.record.provenance["weights"]) == ["unet"]
    registry = load_registry()
    for line in lines:
        assert verify_image(tmp_path / json.loads(line)["path"], registry, RunSettings(device="cpu")).identical
    asked = command("--from", path, "--dry-run").stdout
    assert json.loads(asked) == info.record.request.typed()
    assert "generates without a prompt" in command("a cat", "-m", folders["grey"], code=2).stderr


def test_lines_of_a_file_need_no_prompt_and_are_resumed(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"seed": 1}\n{"width": 32, "num_images": 2}\n{"prompt": "a cat"}\n')
    registry, typed = load_registry(), {"model": str(folders["grey"]), "steps": 2}

    def run() -> list[Result]:
        lines = read_lines(str(tmp_path / "jobs.jsonl"))
        *jobs, bad = expand(lines, typed, registry, num_images=1, base_seed=5)
        assert isinstance(bad, BadJob)
        assert "line 3: " in str(bad.error)
        good = [job for job in jobs if isinstance(job, ResolvedJob)]
        return results(generate_files(good, tmp_path, resume=True, journal=Journal(tmp_path)))

    first = run()
    assert sorted(result.status for result in first) == ["done", "done", "done"]
    lost = first[-1].path
    assert lost is not None
    before = lost.read_bytes()
    lost.unlink()
    assert sorted(result.status for result in run()) == ["done", "skipped", "skipped"]
    assert lost.read_bytes() == before


@pytest.mark.slow
def test_a_class_is_the_prompt(command: Callable[..., Any], folders: dict[str, Path], tmp_path: Path) -> None:
    typed = ("-m", folders["latent-animals"], "--seed", "1", "--steps", "2", "--guidance-scale", "2")
    command("red fox", "2", *typed, "--dtype", "float32", "--batch-size", "1", "-o", "{index}.png")
    named, numbered = (Image.open(tmp_path / f"{index}.png").tobytes() for index in (1, 2))
    assert named == numbered
    pipeline = load_pipeline(folders["latent-animals"])
    request = GenerationRequest(prompt="red fox", seed=1, steps=2, guidance_scale=2)
    (image,) = generate_images(pipeline, [resolve(request, pipeline.model.spec)])
    assert from_pixels(image.pixels).tobytes() == named, "a trainer's image is the one that generate generates"
    assert "name a class: cat, dog, red fox" in command(*typed, code=2).stderr
    assert "did you mean 'red fox'" in command("red fax", *typed, code=2).stderr


def test_a_dry_run_tells_everything_and_loads_nothing_heavy(folders: dict[str, Path], tmp_path: Path) -> None:
    ((_, code, loaded, out, err),) = run([["generate", "-m", str(folders["grey"]), "--dry-run"]], tmp_path)
    assert (code, loaded) == (0, []), err
    request = json.loads(out)
    assert (request["width"], request["steps"], request["scheduler"], request["prompt"]) == (28, 50, "ddim", "")


@pytest.mark.slow
def test_a_model_without_a_vae_neither_encodes_nor_decodes(
    sdcli: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    encoded = sdcli("encode", "x.png", "-m", folders["grey"], "-o", "x.safetensors")
    assert encoded.returncode == 2, encoded.stderr
    assert "has no VAE: it generates on pixels, not on latents" in encoded.stderr
    with pytest.raises(UsageError, match="has no text encoder: it generates without text"):
        load_model(spec_of_folder(folders["latents"]), parts=("text_encoder",), device="cpu")


def test_latents_of_an_unconditional_model_are_encoded_and_decoded(folders: dict[str, Path], tmp_path: Path) -> None:
    vae = LoadedVae.load(spec_of_folder(folders["latents"]), RunSettings(device="cpu"))
    latents, _ = vae.encode([torch.rand(3, 64, 64)], seeds=None)
    image, _ = vae.decode(latents[0])
    assert (tuple(latents.shape), image.size) == ((1, 4, 8, 8), (64, 64))


# The laws


@pytest.mark.parametrize("name", ["animals", "latent-animals"])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(folders: dict[str, Path], name: str, scheduler: str) -> None:
    pipeline = load_pipeline(folders[name])
    requests = requests_of(pipeline, prompts("cat", "dog"), steps=3, scheduler=scheduler, guidance_scale=2.0)
    together = generate_images(pipeline, requests, batch_size=2)
    alone = generate_images(pipeline, requests, batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert (a.batch_size, b.batch_size) == (2, 1)
        assert float((a.pixels - b.pixels).abs().max()) <= 2 / 255


@pytest.mark.parametrize(("width", "height"), [(8, 8), (10, 14), (28, 30), (64, 16)])
def test_pixels_are_painted_in_any_size_the_unet_can_halve(folders: dict[str, Path], width: int, height: int) -> None:
    pipeline = load_pipeline(folders["digits"])
    assert latents(pipeline, NO_PROMPTS, steps=1, width=width, height=height).shape == (2, 1, height, width)
