"""SDXL: diffusers' StableDiffusionXLPipeline is the oracle, its Img2Img pipeline that of the refiner."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor

from sdcli.denoise.sampler import make_scheduler
from sdcli.loading import load_model
from sdcli.pipeline import Painter, decode, paint
from sdcli.registry import resolve, spec_of_folder
from sdcli.request import GenerationRequest
from sdcli.schedulers import SCHEDULERS
from tests.tiny import save_tiny_sdxl

PROMPTS = ["an astronaut riding a horse", "a red apple"]
NEGATIVES = ["blurry", ""]
SEEDS = [11, 42]
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
    return quiet(StableDiffusionXLPipeline.from_pretrained(folders["base"], dtype=torch.float32))


@pytest.fixture(scope="module")
def refiner(folders: dict[str, Path]) -> StableDiffusionXLImg2ImgPipeline:
    return quiet(StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["refiner"], dtype=torch.float32))


@pytest.fixture(scope="module")
def painter(folders: dict[str, Path]) -> Painter:
    base, refiner = (
        load_model(spec_of_folder(folders[name]), dtype="float32", device="cpu") for name in ("base", "refiner")
    )
    return Painter.of(base, refiner=refiner)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    # from_pretrained maps the file, so this one matrix is at an odd address, where its product rounds differently
    projection = pipeline.text_encoder_2.text_projection
    projection.weight.data = projection.weight.data.clone()
    return pipeline


def ours(painter: Painter, **fields: Any) -> Tensor:
    negatives = fields.pop("negatives", NEGATIVES)
    requests = [
        resolve(GenerationRequest(prompt=prompt, negative_prompt=negative, seed=seed, **fields), painter.model.spec)
        for prompt, negative, seed in zip(PROMPTS, negatives, SEEDS, strict=True)
    ]
    *_, last = paint(painter, requests)
    return last.latents


def theirs(pipeline: Any, scheduler: str, config: Any, *, negatives: list[str] = NEGATIVES, **fields: Any) -> Tensor:
    """Each prompt is encoded alone, and an empty negative prompt is none at all, which is when diffusers takes zeros."""
    pipeline.scheduler = make_scheduler(scheduler, config)
    fields = {"generator": generators(), **fields}
    encoded = [
        pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=fields["guidance_scale"] > 1, negative_prompt=no or None
        )
        for prompt, no in zip(PROMPTS, negatives, strict=True)
    ]
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    states = {
        name: None if tensors[0] is None else torch.cat(tensors)
        for name, tensors in zip(names, zip(*encoded, strict=True), strict=True)
    }
    steps = fields.pop("steps")
    return pipeline(**states, num_inference_steps=steps, output_type="latent", **fields).images


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_equal_diffusers_bit_for_bit_with_every_scheduler(
    painter: Painter, base: StableDiffusionXLPipeline, scheduler: str
) -> None:
    fields = {**SMALL, "guidance_scale": 7.5}
    expected = theirs(base, scheduler, painter.model.scheduler_config, **fields)
    assert torch.equal(ours(painter_alone(painter), scheduler=scheduler, **fields), expected)


def painter_alone(painter: Painter) -> Painter:
    return Painter.of(painter.model)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_without_guidance_turbo_equals_diffusers(
    painter: Painter, base: StableDiffusionXLPipeline, guidance_scale: float
) -> None:
    turbo = {**painter.model.scheduler_config, "timestep_spacing": "trailing"}
    alone = painter_alone(painter)
    alone = replace(alone, model=replace(alone.model, scheduler_config=turbo))
    fields = {**SMALL, "steps": 2, "guidance_scale": guidance_scale, "negatives": ["", ""]}
    for scheduler in ("euler", "euler-a"):
        expected = theirs(base, scheduler, turbo, **fields)
        assert torch.equal(ours(alone, scheduler=scheduler, **fields), expected)


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_is_zeros_only_where_the_folder_says_so(
    folders: dict[str, Path], base: StableDiffusionXLPipeline, tmp_path: Path, zeros: bool
) -> None:
    shutil.copytree(folders["base"], tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    alone = Painter.of(load_model(spec_of_folder(tmp_path / "model"), dtype="float32", device="cpu"))
    request = resolve(GenerationRequest(prompt="a cat", seed=1, **SMALL), alone.model.spec)
    inputs = alone.encode.unconditional([request]).inputs
    _, expected, _, pooled = base.encode_prompt("a cat", device="cpu", negative_prompt=None if zeros else "")
    assert torch.equal(inputs["encoder_hidden_states"], expected)
    assert torch.equal(inputs["text_embeds"], pooled)
    assert zeros == (not inputs["text_embeds"].any())


@pytest.mark.parametrize("scheduler", [name for name, row in SCHEDULERS.items() if row.begins_anywhere])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_refiner_takes_over_as_in_diffusers(
    painter: Painter,
    base: StableDiffusionXLPipeline,
    refiner: StableDiffusionXLImg2ImgPipeline,
    scheduler: str,
    guidance_scale: float,
) -> None:
    assert painter.refiner is not None
    negatives = NEGATIVES if guidance_scale > 1 else ["", ""]
    fields = {"steps": 5, "guidance_scale": guidance_scale, "negatives": negatives}
    shared = {**fields, "generator": generators()}
    after: list[Tensor] = []
    theirs(
        base,
        scheduler,
        painter.model.scheduler_config,
        width=64,
        height=96,
        denoising_end=0.6,
        callback_on_step_end=lambda pipeline, step, t, kept: after.append(kept["latents"]) or {},
        **shared,
    )
    # with Heun's method, of two evaluations a step, diffusers begins a step too many, and the refiner does it again
    begun = after[-1 if scheduler != "heun" else -2]
    config = painter.refiner.model.scheduler_config
    expected = theirs(refiner, scheduler, config, image=begun, denoising_start=0.6, **shared)
    found = ours(painter, scheduler=scheduler, width=64, height=96, refiner="refiner", refiner_start=0.6, **fields)
    assert torch.equal(found, expected)
