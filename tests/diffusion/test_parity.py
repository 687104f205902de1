"""diffusers' StableDiffusionPipeline is the oracle: with equal weights and seeds our latents are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.generation.resolve.resolve import resolve
from sdcli.io.files import PACKAGE
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.schedulers import schedulers_for
from sdcli.request.schema import GenerationRequest
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.tiny import save_tiny_pipeline

PROMPTS = ["an astronaut riding a horse", "a red apple"]
NEGATIVES = ["blurry", ""]
SEEDS = [11, 42]


def ours(pipeline: Pipeline, **fields: Any) -> Tensor:
    requests = [
        resolve(GenerationRequest(prompt=prompt, negative_prompt=negative, seed=seed, **fields), pipeline.model.spec)
        for prompt, negative, seed in zip(PROMPTS, NEGATIVES, SEEDS, strict=True)
    ]
    *_, last = sample(pipeline, requests)
    return last.latents


def theirs(reference: StableDiffusionPipeline, scheduler: str, config: Any, **fields: Any) -> Tensor:
    reference.scheduler = make_scheduler(scheduler, config)
    template = fields.pop("prompt_template", "{prompt}")
    encoded = [
        reference.encode_prompt(template.replace("{prompt}", prompt), "cpu", 1, fields["guidance_scale"] > 1, negative)
        for prompt, negative in zip(PROMPTS, NEGATIVES, strict=True)
    ]
    return reference(
        prompt_embeds=torch.cat([positive for positive, _ in encoded]),
        negative_prompt_embeds=torch.cat([n for _, n in encoded]) if fields["guidance_scale"] > 1 else None,
        num_inference_steps=fields.pop("steps"),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **fields,
    ).images


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> tuple[Pipeline, StableDiffusionPipeline]:
    pipeline = Pipeline.of(load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu"))
    reference = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return pipeline, reference


@pytest.fixture(scope="module")
def starter() -> tuple[Pipeline, StableDiffusionPipeline]:
    pipeline = Pipeline.of(load_model(load_registry().find("starter"), dtype="float32", device="cpu"))
    reference = StableDiffusionPipeline.from_pretrained(PACKAGE / "starter", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return pipeline, reference


@pytest.mark.parametrize("scheduler", schedulers_for("diffusion"))
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_latents_equal_diffusers_bit_for_bit_with_every_scheduler(
    tiny: tuple[Pipeline, StableDiffusionPipeline],
    scheduler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, reference = tiny
    if guidance_scale == 1.0:
        monkeypatch.setattr("tests.diffusion.test_parity.NEGATIVES", ["", ""])
    fields = {"width": 64, "height": 96, "steps": 5, "guidance_scale": guidance_scale}
    expected = theirs(reference, scheduler, pipeline.model.scheduler_config, **fields)
    assert torch.equal(ours(pipeline, scheduler=scheduler, **fields), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_eta_equals_diffusers(tiny: tuple[Pipeline, StableDiffusionPipeline], eta: float) -> None:
    pipeline, reference = tiny
    fields = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 5.0, "eta": eta}
    expected = theirs(reference, "ddim", pipeline.model.scheduler_config, **fields)
    assert torch.equal(ours(pipeline, scheduler="ddim", **fields), expected)


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
def test_the_starter_equals_diffusers_bit_for_bit(
    starter: tuple[Pipeline, StableDiffusionPipeline], scheduler: str
) -> None:
    """v-prediction, zero terminal SNR, trailing spacing and an AutoencoderTiny: the other half of the settings."""
    pipeline, reference = starter
    fields = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 5.0}
    template = pipeline.model.spec.defaults.prompt_template
    expected = theirs(reference, scheduler, pipeline.model.scheduler_config, prompt_template=template, **fields)
    assert torch.equal(ours(pipeline, scheduler=scheduler, **fields), expected)


@pytest.mark.parametrize("model", ["tiny", "starter"])
def test_decoded_pixels_equal_diffusers(model: str, request: pytest.FixtureRequest) -> None:
    pipeline, reference = request.getfixturevalue(model)
    channels = reference.vae.config.latent_channels
    latents = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample
    expected = reference.image_processor.postprocess(decoded, output_type="pt")[0]
    assert torch.equal(pipeline.space.decode(latents[:1])[0], expected)


def test_a_distilled_unet_takes_the_guidance_scale_as_an_input(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "lcm", time_cond_proj_dim=32)
    pipeline = Pipeline.of(load_model(spec_of_folder(folder), dtype="float32", device="cpu"))
    reference = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    request = resolve(
        GenerationRequest(prompt="a cat", seed=1, width=64, height=64, steps=3, guidance_scale=8.0, scheduler="lcm"),
        pipeline.model.spec,
    )
    *_, last = sample(pipeline, [request])
    reference.scheduler = make_scheduler("lcm", pipeline.model.scheduler_config)
    expected = reference(
        "a cat",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=8.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert torch.equal(last.latents, expected)
