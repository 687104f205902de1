"""diffusers' StableDiffusionPipeline is the oracle: with equal weights and seeds our latents are the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdcli.diffusion.pipeline import Pipeline
from sdcli.io.files import PACKAGE
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.request.schedulers import schedulers_for
from tests.oracle import TWO, UNGUIDED, latents, load_pipeline, prompts, reference_latents, reference_of
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.tiny import save_tiny_pipeline


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> tuple[Pipeline, StableDiffusionPipeline]:
    return load_pipeline(tiny_folder), reference_of(StableDiffusionPipeline, tiny_folder)


@pytest.fixture(scope="module")
def starter() -> tuple[Pipeline, StableDiffusionPipeline]:
    pipeline = Pipeline.of(load_model(load_registry().find("starter"), dtype="float32", device="cpu"))
    return pipeline, reference_of(StableDiffusionPipeline, PACKAGE / "starter")


@pytest.mark.parametrize("scheduler", schedulers_for("diffusion"))
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_latents_equal_diffusers_bit_for_bit_with_every_scheduler(
    tiny: tuple[Pipeline, StableDiffusionPipeline],
    scheduler: str,
    guidance_scale: float,
) -> None:
    pipeline, reference = tiny
    batch = TWO if guidance_scale > 1 else UNGUIDED
    fields = {"width": 64, "height": 96, "steps": 5, "guidance_scale": guidance_scale, "scheduler": scheduler}
    expected = reference_latents(reference, batch, config=pipeline.model.scheduler_config, **fields)
    assert torch.equal(latents(pipeline, batch, **fields), expected)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_eta_equals_diffusers(tiny: tuple[Pipeline, StableDiffusionPipeline], eta: float) -> None:
    pipeline, reference = tiny
    fields = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 5.0, "eta": eta, "scheduler": "ddim"}
    expected = reference_latents(reference, config=pipeline.model.scheduler_config, **fields)
    assert torch.equal(latents(pipeline, **fields), expected)


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
def test_the_starter_equals_diffusers_bit_for_bit(
    starter: tuple[Pipeline, StableDiffusionPipeline], scheduler: str
) -> None:
    """v-prediction, zero terminal SNR, trailing spacing and an AutoencoderTiny: the other half of the settings."""
    pipeline, reference = starter
    fields = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 5.0, "scheduler": scheduler}
    model = pipeline.model
    expected = reference_latents(
        reference, config=model.scheduler_config, template=model.spec.defaults.prompt_template, **fields
    )
    assert torch.equal(latents(pipeline, **fields), expected)


@pytest.mark.parametrize("model", ["tiny", "starter"])
def test_decoded_pixels_equal_diffusers(model: str, request: pytest.FixtureRequest) -> None:
    pipeline, reference = request.getfixturevalue(model)
    channels = reference.vae.config.latent_channels
    x = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = reference.vae.decode(x / reference.vae.config.scaling_factor).sample
    expected = reference.image_processor.postprocess(decoded, output_type="pt")[0]
    assert torch.equal(pipeline.space.decode(x)[0], expected)


def test_a_distilled_unet_takes_the_guidance_scale_as_an_input(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "lcm", time_cond_proj_dim=32)
    pipeline, reference = load_pipeline(folder), reference_of(StableDiffusionPipeline, folder)
    cat = prompts("a cat", seeds=(1,))
    fields = {"width": 64, "height": 64, "steps": 3, "guidance_scale": 8.0, "scheduler": "lcm"}
    expected = reference_latents(reference, cat, config=pipeline.model.scheduler_config, **fields)
    assert torch.equal(latents(pipeline, cat, **fields), expected)
