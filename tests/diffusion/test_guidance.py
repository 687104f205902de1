"""Guidance beside the plain one: perturbed attention equals diffusers' reference, and leaves the network as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.scheduler_factory import make_scheduler
from sdcli.errors import UsageError
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.families import UNCONDITIONAL
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import parse_request
from tests import oracle
from tests.tiny import save_tiny_pipeline

CAT = oracle.prompts("a cat", seeds=(7,))


def latents(pipeline: Pipeline, **fields: Any) -> Tensor:
    return oracle.latents(pipeline, CAT, **{"steps": 4, "width": 64, "height": 64, **fields})


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Pipeline:
    return oracle.load_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Any:
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    more = {"requires_safety_checker": False, "pag_applied_layers": ["mid"]}
    return oracle.comparable(StableDiffusionPAGPipeline(**plain.components, **more))


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp-2m"])
@pytest.mark.parametrize(
    "guidance", [{"guidance_scale": 5.0}, {"guidance_scale": 5.0, "guidance_rescale": 0.6}, {"guidance_scale": 1.0}]
)
def test_perturbed_attention_equals_diffusers(
    pipeline: Pipeline, reference: Any, scheduler: str, guidance: dict[str, float]
) -> None:
    fields = {"steps": 4, "width": 64, "height": 64, "scheduler": scheduler, "pag_scale": 3.0, **guidance}
    expected = oracle.reference_latents(reference, CAT, config=pipeline.model.scheduler_config, **fields)
    got = latents(pipeline, scheduler=scheduler, pag_scale=3.0, **guidance)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_scale_of_zero_is_no_guidance_and_the_network_stays_as_it_was(pipeline: Pipeline) -> None:
    before = latents(pipeline)
    assert not torch.equal(latents(pipeline, pag_scale=3.0), before)
    assert torch.equal(latents(pipeline, pag_scale=0), before)
    assert torch.equal(latents(pipeline), before)


def test_perturbed_attention_is_refused_where_it_means_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not go with AND"):
        latents(pipeline, prompt="a cat AND a dog", pag_scale=3.0)
    folder = save_tiny_pipeline(tmp_path / "no-middle", mid_block_type=None)
    other = oracle.load_pipeline(folder)
    with pytest.raises(UsageError, match="no self-attention in the middle"):
        latents(other, pag_scale=3.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_table_says_how_often_a_scheduler_asks_the_network(pipeline: Pipeline, name: str) -> None:
    scheduler = make_scheduler(name, pipeline.model.scheduler_config)
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == SCHEDULERS[name].calls(7)


def test_an_interval_without_a_step_is_refused(pipeline: Pipeline) -> None:
    asked = parse_request({"prompt": "a cat", "steps": 4, "scheduler": "euler", "guidance_interval": "0.55-0.7"})
    with pytest.raises(UsageError, match=r"0.55-0.7 of 4 steps leaves guidance no step"):
        resolve(asked, pipeline.model.spec)
    assert resolve(asked.changed(scheduler="heun"), pipeline.model.spec).guidance_interval is not None


def test_the_last_scale_alone_is_guidance_and_has_one_spelling(pipeline: Pipeline) -> None:
    spec = pipeline.model.spec.model_copy(update={"family": UNCONDITIONAL, "kind": UNCONDITIONAL.kind})
    with pytest.raises(UsageError, match="cannot be guided"):
        resolve(parse_request({"guidance_scale": 1, "guidance_end": 5}), spec)
    with pytest.raises(UsageError, match="guidance_end is given twice"):
        parse_request({"guidance_scale": "7..3", "guidance_end": 5})
