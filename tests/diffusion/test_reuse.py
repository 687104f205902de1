"""`--reuse N`: the outer layers on kept features equal the whole network with its deep part held fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sdcli.diffusion.pipeline import Pipeline
from sdcli.errors import UsageError
from sdcli.generation.events import Failed, Generated, Progress
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.observers import HeatmapObserver, TraceObserver
from sdcli.generation.plan import Batch
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.run_batch import run_batch
from sdcli.generation.settings import TraceSettings
from sdcli.models.controlnet import load_controlnet, with_controlnets
from sdcli.models.families import SD3
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.schema import parse_request
from tests import oracle
from tests.service import cache_of, pipeline_for
from tests.tiny import save_tiny_controlnet, save_tiny_ip_adapter, save_tiny_pipeline, save_tiny_sdxl

SMALL: dict[str, Any] = {"steps": 7, "width": 64, "height": 64, "scheduler": "ddim", "guidance_scale": 5.0}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """One whose last block has attention."""
    return oracle.load_pipeline(save_tiny_pipeline(tmp_path_factory.mktemp("model") / "cross", **CROSS))


def latents(pipeline: Pipeline, **fields: Any) -> Tensor:
    batch = oracle.prompts("a cat", "a dog", seeds=(7, 8))
    return oracle.latents(pipeline, batch, **{**SMALL, **fields})


@contextlib.contextmanager
def calls_of(module: Any) -> Iterator[list[int]]:
    """The rows of each call of a module."""
    rows: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


@contextlib.contextmanager
def deep_part_held(unet: Any, whole: set[int]) -> Iterator[None]:
    """The naive reference: every step runs the whole network, and in those that are not `whole` the features before
    its last layers are replaced by those of the last whole one."""
    calls, kept, skipped = [0], [torch.empty(0)], unet.config.block_out_channels[0]

    def hold(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if calls[0] in whole:
            kept[0] = inputs[0][:, :-skipped]
        calls[0] += 1
        return torch.cat([kept[0], inputs[0][:, -skipped:]], dim=1), *inputs[1:]

    handle = unet.up_blocks[-1].resnets[-2].register_forward_pre_hook(hold)
    try:
        yield
    finally:
        handle.remove()


def test_one_is_every_step_to_the_bit(pipeline: Pipeline) -> None:
    assert torch.equal(latents(pipeline, reuse=1), latents(pipeline))


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0}, {"scheduler": "euler-a"}, {"prompt": "a AND b"}])
def test_it_equals_the_whole_network_with_its_deep_features_held(pipeline: Pipeline, fields: dict[str, Any]) -> None:
    got = latents(pipeline, reuse=3, **fields)
    assert not torch.equal(got, latents(pipeline, **fields))
    with deep_part_held(pipeline.model.unet, {0, 3, 6}):
        assert torch.equal(got, latents(pipeline, **fields))


@pytest.mark.slow
def test_it_equals_the_reference_with_a_last_block_without_attention_and_on_sdxl(tmp_path: Path) -> None:
    for folder in (save_tiny_pipeline(tmp_path / "plain"), save_tiny_sdxl(tmp_path / "sdxl")):
        other = oracle.load_pipeline(folder)
        got = latents(other, reuse=2)
        with deep_part_held(other.model.unet, {0, 2, 4, 6}):
            assert torch.equal(got, latents(other))


@pytest.mark.slow
def test_with_a_controlnet_the_first_skip_connections_get_their_residuals_of_each_step(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", **CROSS)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "map.png")
    plain = oracle.load_pipeline(folder)
    name = str(save_tiny_controlnet(tmp_path / "controlnet", folder))
    network = load_controlnet(load_registry().find_controlnet(name), plain.model)
    pipeline = replace(plain, model=with_controlnets(plain.model, {name: network}))
    fields = {"controls": [f"{name}={tmp_path / 'map.png'}:0.7@0-0.6"]}
    got = latents(pipeline, reuse=2, **fields)
    with deep_part_held(pipeline.model.unet, {0, 2, 4, 6}):
        assert torch.equal(got, latents(pipeline, **fields))
    assert not torch.equal(got, latents(pipeline, reuse=2))


@pytest.mark.slow
def test_with_an_ip_adapter_the_last_layers_attend_to_the_image_in_each_step(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", **CROSS)
    adapter = save_tiny_ip_adapter(tmp_path / "adapters", folder)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "image.png")
    fields = {"ip_adapters": [f"{adapter}={tmp_path / 'image.png'}"], "model": str(folder)}
    plain = oracle.load_pipeline(folder)
    (request,) = oracle.requests_of(plain, oracle.prompts("a cat", seeds=(7,)), **SMALL, **fields)
    pipeline = pipeline_for(cache_of(dtype="float32", safety="off"), request)
    got = latents(pipeline, reuse=2, **fields)
    with deep_part_held(pipeline.model.unet, {0, 2, 4, 6}):
        assert torch.equal(got, latents(pipeline, **fields))
    assert not torch.equal(got, latents(plain, reuse=2))


def test_the_steps_between_run_the_last_layers_alone_with_both_halves_of_guidance(pipeline: Pipeline) -> None:
    unet = pipeline.model.unet
    with calls_of(unet.mid_block) as deep, calls_of(unet.up_blocks[-1].resnets[-2]) as last:
        latents(pipeline, reuse=3)
    assert (deep, last) == ([4, 4, 4], [4] * 7)


def test_each_branch_of_guidance_keeps_its_own_features(pipeline: Pipeline) -> None:
    middle = pipeline.model.unet.mid_block
    with calls_of(middle) as deep:  # steps 0, 1 | 2, 3, 4 | 5, 6: each change of the branch begins with a whole step
        latents(pipeline, reuse=2, guidance_interval="0.3-0.8")
    assert deep == [2, 4, 4, 2]
    with calls_of(middle) as deep:
        latents(pipeline, reuse=4, pag_scale=3.0)
    assert deep == [4, 2, 4, 2]
    assert not torch.equal(latents(pipeline, reuse=4, pag_scale=3.0), latents(pipeline, reuse=4))


def test_a_prompt_that_changes_takes_effect_at_once(pipeline: Pipeline) -> None:
    middle = pipeline.model.unet.mid_block
    with calls_of(middle) as deep:
        latents(pipeline, prompt="a [cat:dog:3]", reuse=7)
    assert len(deep) == 2
    alternating = latents(pipeline, prompt="a [cat|dog]", reuse=7)
    assert torch.equal(alternating, latents(pipeline, prompt="a [cat|dog]"))


@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
def test_with_schedulers_that_call_twice_a_step_is_whole_once(pipeline: Pipeline, scheduler: str) -> None:
    with calls_of(pipeline.model.unet.mid_block) as deep:
        assert latents(pipeline, reuse=2, scheduler=scheduler).isfinite().all()
    assert len(deep) == 4


@pytest.mark.slow
def test_each_pass_and_the_refiner_begin_with_a_whole_step(pipeline: Pipeline, tmp_path: Path) -> None:
    middle = pipeline.model.unet.mid_block
    with calls_of(middle) as deep:
        latents(pipeline, steps=8, reuse=20, upscale="1.5x:0.75:latent")
    assert len(deep) == 2
    base = oracle.load_pipeline(save_tiny_sdxl(tmp_path / "base"))
    refiner = load_model(spec_of_folder(save_tiny_sdxl(tmp_path / "refiner", refiner=True)), device="cpu")
    both = base.with_refiner(refiner)
    with calls_of(base.model.unet.mid_block) as first, calls_of(refiner.unet.mid_block) as second:
        latents(both, reuse=20, refiner="refiner", refiner_start=0.5)
    assert (len(first), len(second)) == (1, 1)


@pytest.mark.slow
def test_init_images_masks_and_inpainting_models_take_it(pipeline: Pipeline, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "start.png")
    start = {"init_image": str(tmp_path / "start.png"), "steps": 8, "strength": 0.8}
    inpainting = oracle.load_pipeline(save_tiny_pipeline(tmp_path / "inpainting", in_channels=9))
    masked = start | {"mask": str(tmp_path / "start.png")}
    for one, fields in ((pipeline, start), (pipeline, masked), (inpainting, masked)):
        got = latents(one, reuse=2, **fields)
        with deep_part_held(one.model.unet, {0, 2, 4}):
            assert torch.equal(got, latents(one, **fields))


# Batches and observers


def jobs_of(*prompts: str, **fields: Any) -> list[ResolvedJob]:
    registry = load_registry()
    spec = registry.find("tiny")
    requests = [{"model": "tiny", "prompt": prompt, "seed": 3, **SMALL, **fields} for prompt in prompts]
    return [ResolvedJob(n, resolve(parse_request(one), spec), spec) for n, one in enumerate(requests)]


def images(cache: ModelCache, jobs: list[ResolvedJob], *gone: int) -> dict[int, Tensor]:
    """The pixels of each job's image; those of `gone` are cancelled after the second step."""
    steps: list[Progress] = []
    found = {}

    def is_cancelled(job: ResolvedJob) -> bool:
        return len(steps) >= 2 and job.index in gone

    with cache.lease(jobs[0]) as lease:
        for event in run_batch(lease, Batch.of(jobs), cancelled=is_cancelled):
            if isinstance(event, Progress):
                steps.append(event)
            if isinstance(event, Generated):
                found[event.job.index] = event.pixels
    return found


@pytest.mark.slow
def test_cancelled_batch_mates_change_no_bytes_and_repeated_runs_are_equal() -> None:
    cache, jobs = cache_of(), jobs_of("a", "b", "c", reuse=3)
    whole, again, left = images(cache, jobs), images(cache, jobs), images(cache, jobs, 0, 2)
    assert (len(whole), len(left)) == (3, 1)
    assert torch.equal(left[1], whole[1])
    assert all(torch.equal(again[index], pixels) for index, pixels in whole.items())
    assert not torch.equal(images(cache, jobs_of("a", "b", "c"))[1], whole[1])


def test_a_trace_goes_with_it_and_a_heatmap_does_not() -> None:
    (job,) = jobs_of("a cat", reuse=2)
    with cache_of().lease(job) as lease:
        *_, traced = run_batch(lease, Batch.of([job]), observers=[TraceObserver(TraceSettings(4))])
        *_, mapped = run_batch(lease, Batch.of([job]), observers=[HeatmapObserver(())])
    assert isinstance(traced, Generated)
    assert len(list(traced.side_files)) == 2
    assert isinstance(mapped, Failed)
    assert "--heatmap does not go with --reuse" in str(mapped.error)


# Where it would be wrong


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 4}, "reuse needs more than 4 steps, not 4"),
        ({"steps": 5, "init_image": "start.png", "strength": 0.8}, "reuse needs more than 4 steps, not 4"),
        ({"scheduler": "lcm"}, "does not go with the lcm scheduler"),
    ],
)
def test_few_steps_are_refused(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("start.png")
    with pytest.raises(UsageError, match=message):
        latents(pipeline, reuse=2, **fields)


def test_networks_that_it_is_not_for_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    distilled = oracle.load_pipeline(save_tiny_pipeline(tmp_path / "distilled", time_cond_proj_dim=32))
    with pytest.raises(UsageError, match="was distilled to few steps"):
        latents(distilled, reuse=2)
    transformer = pipeline.model.spec.model_copy(update={"family": SD3})
    with pytest.raises(UsageError, match=r"reuse: .* has a transformer"):
        resolve(parse_request({"prompt": "a", "reuse": 2, "scheduler": "flow-euler"}), transformer)
    assert resolve(parse_request({"prompt": "a", "reuse": 1, "scheduler": "flow-euler"}), transformer).reuse == 1
