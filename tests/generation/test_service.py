"""The laws of generating: what an image depends on, and what happens when memory or numbers fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.diffusion import sampling
from sdcli.errors import BadOutput, CannotWrite, OutOfMemory, UsageError
from sdcli.generation import run_batch as run_batch_module
from sdcli.generation.events import Event, Note, Phase, Progress, Result
from sdcli.generation.filenames import check_output
from sdcli.generation.journal import Journal
from sdcli.generation.plan import Limits, automatic_batch_size, batch_size_of, plan
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.settings import OutputSettings, RunSettings
from sdcli.generation.verify import verify_image
from sdcli.io.files import AlreadyExists
from sdcli.metadata.read import read_image
from sdcli.models.registry import Registry, load_registry
from sdcli.request.jobs import Line
from sdcli.vae.latent_space import LatentSpace
from tests.service import cache_of, generate_files, indices, pipeline_of, results


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def jobs_of(registry: Registry, *prompts: str, **typed: Any) -> list[ResolvedJob]:
    lines = [Line(0, {"prompt": prompt}) for prompt in prompts]
    jobs = expand(lines, typed, registry, num_images=typed.pop("num_images", 1), base_seed=5)
    return [job for job in jobs if isinstance(job, ResolvedJob)]


def sample(
    registry: Registry, folder: Path, jobs: list[ResolvedJob], *, batch_size: int | None = None, **output: Any
) -> list[Event]:
    return generate_files(jobs, folder, template="{index}", run={"batch_size": batch_size}, **output)


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("model", ["tiny", pytest.param("starter", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler-a"])
def test_an_image_does_not_depend_on_its_batch(registry: Registry, tmp_path: Path, model: str, scheduler: str) -> None:
    jobs = jobs_of(registry, "a cat", "a dog", "a house", model=model, seed=7, steps=4, scheduler=scheduler)
    sample(registry, tmp_path / "together", jobs, batch_size=3)
    sample(registry, tmp_path / "alone", jobs, batch_size=1)
    for name in ("1.png", "2.png", "3.png"):
        assert np.abs(pixels(tmp_path / "together" / name) - pixels(tmp_path / "alone" / name)).max() <= 2


def test_the_same_request_twice_gives_the_same_bytes(registry: Registry, tmp_path: Path) -> None:
    jobs = jobs_of(registry, "a cat", "a dog", model="tiny", seed=7, scheduler="ddpm")
    for name in ("first", "second"):
        sample(registry, tmp_path / name, jobs, batch_size=2)
    assert images(tmp_path / "first") == images(tmp_path / "second")
    assert len(images(tmp_path / "first")) == 2


def test_other_neighbours_in_a_batch_of_equal_size_do_not_change_a_byte(registry: Registry, tmp_path: Path) -> None:
    for name, other in (("one", "a dog"), ("two", "a very different thing")):
        jobs = jobs_of(registry, "a cat", other, model="starter", seed=7, steps=3)
        sample(registry, tmp_path / name, jobs, batch_size=2)
    assert pixels(tmp_path / "one" / "1.png").tolist() == pixels(tmp_path / "two" / "1.png").tolist()
    assert pixels(tmp_path / "one" / "2.png").tolist() != pixels(tmp_path / "two" / "2.png").tolist()


def test_image_number_k_starts_from_the_noise_of_its_own_seed(registry: Registry, tmp_path: Path) -> None:
    many = jobs_of(registry, "a cat", model="tiny", seed=7, num_images=3)
    assert [job.request.seed for job in many] == [7, 8, 9]
    sample(registry, tmp_path / "many", many, batch_size=1)
    sample(registry, tmp_path / "one", jobs_of(registry, "a cat", model="tiny", seed=9), batch_size=1)
    assert (tmp_path / "many" / "3.png").read_bytes() == (tmp_path / "one" / "1.png").read_bytes()


@pytest.mark.parametrize(("scale", "rows"), [(7.5, 2), (1.0, 1), (0.0, 1)])
def test_guidance_of_one_computes_no_unconditional_half(
    registry: Registry, tmp_path: Path, scale: float, rows: int
) -> None:
    cache = cache_of()
    seen: list[int] = []
    unet = pipeline_of(cache, registry.find("tiny")).model.unet
    unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    generate_files(jobs_of(registry, "a cat", model="tiny", guidance_scale=scale, steps=3), tmp_path, cache=cache)
    assert seen == [rows] * 3


def test_an_image_holds_the_request_that_paints_it_again(registry: Registry, tmp_path: Path) -> None:
    sample(registry, tmp_path / "first", jobs_of(registry, "a cat\nin a hat", model="tiny", scheduler="euler-a"))
    info = read_image(tmp_path / "first" / "1.png")
    assert info.request is not None
    again = list(expand([Line(0, {})], info.request.typed(), registry, num_images=1, base_seed=99))
    sample(registry, tmp_path / "second", again)
    assert images(tmp_path / "first") == images(tmp_path / "second")
    assert len(images(tmp_path / "second")) == 1


@pytest.mark.slow
def test_every_image_of_a_batch_verifies_alone(registry: Registry, tmp_path: Path) -> None:
    sample(
        registry, tmp_path, jobs_of(registry, "a cat", "a dog", "a fox", model="starter", seed=3, steps=3), batch_size=3
    )
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == 3
    for path in paths:
        assert verify_image(path, registry, RunSettings(device="cpu")).identical


@pytest.mark.slow
def test_an_image_of_other_weights_does_not_verify_and_they_are_named(registry: Registry, tmp_path: Path) -> None:
    sample(registry, tmp_path, jobs_of(registry, "a cat", model="tiny", seed=3))
    tiny = registry.models["tiny"]
    other = tiny.model_copy(update={"source": tiny.source.model_copy(update={"seed": 1})})
    changed = registry.model_copy(update={"models": {**registry.models, "tiny": other}})
    verdict = verify_image(tmp_path / "1.png", changed, RunSettings(device="cpu"))
    assert not verdict.identical
    assert any(difference.startswith("the unet has other weights") for difference in verdict.differences)
    with pytest.raises(BadOutput):
        verdict.raise_if_different()


def test_an_edited_image_is_told_from_one_that_cannot_be_repeated(registry: Registry, tmp_path: Path) -> None:
    sample(registry, tmp_path, jobs_of(registry, "a cat", model="tiny", seed=3))
    with Image.open(tmp_path / "1.png") as image:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for name, text in image.text.items():
            info.add_text(name, text)
        edited = image.copy()
    edited.putpixel((0, 0), (1, 2, 3))
    edited.save(tmp_path / "edited.png", pnginfo=info)
    verdict = verify_image(tmp_path / "edited.png", registry, RunSettings(device="cpu"))
    assert verdict.identical
    assert verdict.edited


def oom_above(limit: int, original: Any) -> Any:
    def sample(pipeline: Any, requests: Any, **options: Any) -> Iterator[Any]:
        if len(requests) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from original(pipeline, requests, **options)

    return sample


@pytest.mark.slow
def test_out_of_memory_while_denoising_halves_the_batch(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(registry, *"abcde", model="tiny", seed=1)
    monkeypatch.setattr(run_batch_module, "sample", oom_above(2, sampling.sample))
    events = sample(registry, tmp_path / "crowded", jobs, batch_size=5)
    monkeypatch.undo()
    sample(registry, tmp_path / "roomy", jobs, batch_size=1)
    results = [event for event in events if isinstance(event, Result)]
    assert [result.status for result in results] == ["done"] * 5
    assert any(isinstance(event, Note) and "out of memory" in event.text for event in events)
    assert len(images(tmp_path / "roomy")) == 5
    for name in images(tmp_path / "roomy"):
        assert np.abs(pixels(tmp_path / "crowded" / name) - pixels(tmp_path / "roomy" / name)).max() <= 2
    record = read_image(tmp_path / "crowded" / "1.png").record
    assert record is not None
    assert "halved" in record.provenance["fallbacks"][0]
    assert record.provenance["batch"]["size"] <= 2


def test_out_of_memory_with_one_image_fails_that_image_with_exit_code_5(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_batch_module, "sample", oom_above(0, sampling.sample))
    *_, result = sample(registry, tmp_path, jobs_of(registry, "a", model="tiny"))
    assert isinstance(result, Result)
    assert isinstance(result.error, OutOfMemory)
    assert result.error.exit_code == 5


def statuses(events: list[Event]) -> list[tuple[int, str]]:
    return sorted((event.job.index, event.status) for event in events if isinstance(event, Result))


@pytest.mark.slow
def test_a_piece_of_a_batch_that_fails_leaves_the_others(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(pipeline: Any, requests: Any, **options: Any) -> Iterator[Any]:
        prompts = [request.prompt for request in requests]
        if "b" in prompts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "c AND d" in prompts:
            raise BadOutput("the latents are no longer finite")
        yield from sampling.sample(pipeline, requests, **options)

    monkeypatch.setattr(run_batch_module, "sample", failing)
    jobs = jobs_of(registry, "a", "b", "c AND d", "e", model="tiny", seed=1, steps=2)
    events = sample(registry, tmp_path, jobs, batch_size=4)
    assert statuses(events) == [(1, "done"), (2, "failed"), (3, "failed"), (4, "done")]
    assert list(images(tmp_path)) == ["1.png", "4.png"]


def test_an_image_with_a_bad_file_fails_alone(registry: Registry, tmp_path: Path) -> None:
    names = ("picture", "white", "black", "broken")
    files = {name: str(tmp_path / f"{name}.png") for name in names}
    for name, colour in (("picture", "red"), ("white", "white"), ("black", "black")):
        Image.new("RGB", (64, 64), colour).save(files[name])
    Path(files["broken"]).write_bytes(b"nothing")
    started = [{"prompt": "x", "init_image": files["picture"], "mask": files[name]} for name in names[1:]]
    lines = [Line(number, fields) for number, fields in enumerate([*started, {"prompt": "x"}])]
    jobs = list(expand(lines, {"model": "tiny", "steps": 2}, registry, num_images=1, base_seed=5))
    events = sample(registry, tmp_path / "out", [job for job in jobs if isinstance(job, ResolvedJob)], batch_size=3)
    assert statuses(events) == [(1, "done"), (2, "failed"), (3, "failed"), (4, "done")]


def test_out_of_memory_while_decoding_keeps_the_latents_and_tries_tiles(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[bool] = []

    original = LatentSpace.decode

    def decode(space: Any, x: Any, *, tiled: bool = False) -> Any:
        attempts.append(tiled)
        if not tiled:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return original(space, x, tiled=tiled)

    monkeypatch.setattr(LatentSpace, "decode", decode)
    *_, result = sample(registry, tmp_path, jobs_of(registry, "a", model="tiny"))
    assert isinstance(result, Result)
    assert result.status == "done"
    assert attempts == [False, True]
    record = read_image(tmp_path / "1.png").record
    assert record is not None
    assert record.provenance["fallbacks"] == ["decoded in tiles: out of memory"]


def test_a_half_precision_vae_that_overflows_is_run_again_in_float32(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LatentSpace.decode

    def decode(space: Any, x: Any, *, tiled: bool = False) -> Any:
        image = original(space, x, tiled=tiled)
        return image * float("nan") if space.dtype == torch.bfloat16 else image

    monkeypatch.setattr(LatentSpace, "decode", decode)
    jobs = jobs_of(registry, "a", model="tiny")
    *_, result = generate_files(jobs, tmp_path, template="x", run={"dtype": "bfloat16"})
    assert isinstance(result, Result)
    assert result.status == "done"
    assert result.fallbacks == ("decoded in float32: the half-precision VAE gave no image",)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_black_or_nan_image_is_never_saved(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(LatentSpace, "decode", lambda *_, **__: torch.full((1, 3, 64, 64), value))
    *_, result = sample(registry, tmp_path, jobs_of(registry, "a", model="tiny"))
    assert isinstance(result, Result)
    assert isinstance(result.error, BadOutput)
    assert not images(tmp_path)


def test_nan_in_one_image_of_a_batch_does_not_take_its_neighbours(registry: Registry, tmp_path: Path) -> None:
    cache = cache_of(batch_size=2)

    def poison(_: Any, __: Any, output: Any) -> Any:
        output[0][0] = float("nan")
        return output

    pipeline_of(cache, registry.find("tiny")).model.unet.register_forward_hook(poison)
    jobs = jobs_of(registry, "a", "b", model="tiny", guidance_scale=1)
    events = generate_files(jobs, tmp_path, cache=cache, template="{index}")
    statuses = [event.status for event in events if isinstance(event, Result)]
    assert sorted(statuses) == ["done", "failed"]
    assert list(images(tmp_path)) == ["2.png"]


def test_a_plain_prompt_that_is_too_long_is_cut_aloud_or_refused(registry: Registry, tmp_path: Path) -> None:
    jobs = jobs_of(registry, "cat " * 100 + "unicorn", "a cat", model="tiny", prompt_syntax="plain")
    notes = [event.text for event in sample(registry, tmp_path, jobs) if isinstance(event, Note)]
    assert len(notes) == 1
    assert "101 tokens, 75 fit" in notes[0]
    assert "unicorn" in notes[0]
    found = results(generate_files(jobs, tmp_path / "strict", run={"strict_prompt": True}))
    assert {result.job.index: result.status for result in found} == {1: "failed", 2: "done"}
    assert isinstance(found[0].error, UsageError)


def test_names_in_use_are_never_overwritten_unless_asked(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"mine")
    jobs = jobs_of(registry, "a", model="tiny", seed=1)
    sample(registry, tmp_path, jobs)
    assert (tmp_path / "1.png").read_bytes() == b"mine"
    assert (tmp_path / "1-2.png").exists()
    sample(registry, tmp_path, jobs, overwrite=True)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "1-2.png").read_bytes()


def test_a_resumed_run_overwrites_no_image_that_it_keeps(registry: Registry, tmp_path: Path) -> None:
    first, second = jobs_of(registry, "a", "b", model="tiny", seed=1, steps=2)
    output = {"template": "Picture{steps}", "overwrite": True, "resume": True}
    for jobs in ([first], [first, second]):
        generate_files(jobs, tmp_path, run={"batch_size": 1}, journal=Journal(tmp_path), **output)
    assert list(images(tmp_path)) == ["Picture2-2.png", "Picture2.png"]


def test_each_pass_is_announced_with_its_own_steps(registry: Registry, tmp_path: Path) -> None:
    events = sample(registry, tmp_path, jobs_of(registry, "a", model="tiny", steps=4, upscale="1.5x:0.5:latent"))
    shown = [event for event in events if isinstance(event, Progress) or getattr(event, "name", "") == "denoise"]
    announced = [(place, event.steps) for place, event in enumerate(shown) if isinstance(event, Phase)]
    assert announced == [(0, 4), (5, 2)]


def test_a_name_that_cannot_be_made_fails_one_image_once(registry: Registry, tmp_path: Path) -> None:
    jobs = jobs_of(registry, "a", "b", model="tiny", seed=1, steps=2)
    events = generate_files(jobs, tmp_path, template="{custom_id:d}", run={"batch_size": 2})
    assert statuses(events) == [(1, "failed"), (2, "failed")]


def test_a_taken_name_and_a_folder_without_permission_are_found_before_painting(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"mine")
    with pytest.raises(AlreadyExists):
        check_output(OutputSettings(outdir=tmp_path, template="x.png"))
    with pytest.raises(CannotWrite, match="cannot make the folder"):
        check_output(OutputSettings(outdir=tmp_path / "x.png" / "y"))


def test_batches_hold_jobs_of_one_shape_and_models_are_loaded_once(registry: Registry) -> None:
    lines = [
        Line(number, {"prompt": "x", "model": model, "width": width})
        for number, (model, width) in enumerate(
            [("tiny", 64), ("starter", 64), ("tiny", 128), ("tiny", 64), ("starter", 64)]
        )
    ]
    jobs = [
        job
        for job in expand(lines, {"height": 64}, registry, num_images=1, base_seed=1)
        if isinstance(job, ResolvedJob)
    ]
    assert indices(plan(jobs, Limits())) == [[1, 4], [3], [2, 5]]


def test_the_automatic_batch_size_depends_on_size_and_device_alone() -> None:
    assert automatic_batch_size(512 * 512, on_gpu=False) == 1
    assert automatic_batch_size(128 * 128, on_gpu=False) == 8
    assert automatic_batch_size(4096 * 4096, on_gpu=False) == 1
    assert automatic_batch_size(512 * 512, on_gpu=True) == 16


def test_the_automatic_batch_size_is_that_of_the_latents(registry: Registry) -> None:
    """The starter has 16 pixels a side of a latent cell, so its 256x256 are as much work as 128x128 of others."""
    sizes = {}
    for model, side in (("starter", 256), ("starter", 512), ("tiny", 256)):
        line = Line(1, {"prompt": "x", "model": model, "width": side, "height": side})
        (job,) = expand([line], {}, registry, num_images=1, base_seed=1)
        assert isinstance(job, ResolvedJob)
        sizes[model, side] = batch_size_of(job, Limits())
    assert sizes == {("starter", 256): 8, ("starter", 512): 2, ("tiny", 256): 2}
