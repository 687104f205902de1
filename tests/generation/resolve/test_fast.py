"""`--fast`: presets of models.yaml that are checked, what they set, what overrules them, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from sdcli.errors import Offline, UsageError
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.models.hub.cache import cached_file, ref_file
from sdcli.models.registry import ModelSpec, Registry, load_registry, packaged_registry_file, read_registry_file
from sdcli.models.sources import HubFile
from sdcli.request.jobs import Line
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import ResolvedRequest, parse_request
from tests.conftest import Run
from tests.loras import random_pairs, save_diffusers

PRESET = "{name: quick, scheduler: lcm, steps: 4, most_steps: 6, lora: {source: {kind: file, path: quick.safetensors}}}"


@pytest.fixture
def models_file(tmp_path: Path, tiny_folder: Path) -> Path:
    """A models file with the micro model, whose preset has a LoRA beside it."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    save_diffusers(tmp_path / "quick.safetensors", random_pairs({"unet": unet}, only="to_q"))
    file = tmp_path / "own.yaml"
    file.write_text(f"models:\n  mine:\n    source: {{kind: folder, path: {tiny_folder}}}\n    fast: {PRESET}\n")
    return file


def resolved(spec: ModelSpec, **fields: Any) -> ResolvedRequest:
    return resolve(parse_request({"prompt": "a cat", "model": spec.name, **fields}), spec)


def cached(text: str) -> Path:
    """The place of a file in an empty hub cache, which is made to hold it."""
    file = HubFile.of(text)
    assert file is not None
    ref_file(file.source).parent.mkdir(parents=True, exist_ok=True)
    ref_file(file.source).write_text("a" * 40)
    path = cached_file(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    return path


# The registry


@pytest.mark.parametrize(
    ("preset", "sentence"),
    [
        ("{scheduler: lcm, steps: 4}", "fast.name: Field required"),
        ("{name: x, scheduler: lcmm, steps: 4}", "fast.scheduler: no scheduler 'lcmm'; did you mean 'lcm'?"),
        ("{name: x, scheduler: lcm}", "fast.steps: Field required"),
        ("{name: x, scheduler: lcm, steps: 0}", "fast.steps: should be greater than or equal to 1, not 0"),
        ("{name: x, scheduler: lcm, steps: 4, most_steps: 2}", "most_steps: should be at least the steps, 4, not 2"),
        ("{name: x, scheduler: lcm, steps: 4, guidance_scale: -1}", "fast.guidance_scale: should be greater than or"),
        ("{name: x, scheduler: lcm, steps: 4, lora: {source: {kind: hub, repo: a}}}", "fast.lora.source"),
        ("{name: x, scheduler: lcm, steps: 4, lora: {source: {kind: hub, repo: a/b, file: ../c.safetensors}}}", "file"),
        ("{name: x, scheduler: lcm, steps: 4, lora: {source: {kind: hub, repo: a/b, file: c.ckpt}}}", "file"),
        ("{name: x, scheduler: flow-euler, steps: 4}", "flow-euler scheduler does not go with a model trained as a"),
        ("{name: x, scheduler: lcm, steps: 4, cfg: 1}", "fast.cfg: Extra inputs are not permitted"),
        ("lcm", "fast"),
    ],
)
def test_a_preset_that_is_wrong_is_refused_in_a_sentence(tmp_path: Path, preset: str, sentence: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  mine: {{source: {{kind: hub, repo: a/b}}, fast: {preset}}}\n")
    with pytest.raises(UsageError) as refused:
        read_registry_file(file)
    assert str(refused.value).startswith(f"{file}: models.mine.")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_lora_is_refused_for_a_family_that_takes_none(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    preset = PRESET.replace("lcm", "flow-euler")
    file.write_text(f"models:\n  mine: {{source: {{kind: hub, repo: a/b}}, family: sd3, fast: {preset}}}\n")
    with pytest.raises(UsageError, match=r"fast.lora: models of the sd3 family take no LoRAs yet"):
        read_registry_file(file)


def test_the_packaged_presets_resolve_and_are_within_what_they_were_made_for() -> None:
    _, models, _ = read_registry_file(packaged_registry_file())
    presets = {name: spec.fast for name, spec in models.items() if spec.fast is not None}
    assert set(presets) == {"sd15", "lcm", "sd-turbo", "sdxl", "sdxl-turbo"}
    for name, preset in presets.items():
        assert preset.license != "unknown"
        request = parse_request({"prompt": "a cat", "fast": True})
        if preset.lora is not None:
            assert preset.lora.download_bytes
            with pytest.raises(Offline, match=f"run `sdcli models pull {name} --fast` "):
                resolve(request, models[name])
            cached(preset.lora.ref.path)
        got = resolve(request, models[name])
        assert (got.steps, got.scheduler, got.guidance_scale) == tuple(
            preset.fields()[field] for field in ("steps", "scheduler", "guidance_scale")
        )
        assert preset.is_in(got)
        assert got.fast is None


def test_euler_trailing_begins_at_the_last_noise_level() -> None:
    from sdcli.diffusion.scheduler_factory import make_scheduler

    scheduler = make_scheduler("euler-trailing", {"timestep_spacing": "leading", "steps_offset": 1})
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert SCHEDULERS["euler"].settings == {}


# What it sets


@pytest.fixture
def registry(models_file: Path) -> Registry:
    return load_registry(models_file)


def test_it_sets_all_of_it_together_and_explicit_fields_overrule_it(registry: Registry) -> None:
    spec = registry.models["mine"]
    got = resolved(spec, fast=True)
    assert (got.steps, got.scheduler, got.guidance_scale, got.fast) == (4, "lcm", 1.0, None)
    assert [Path(one.path).name for one in got.loras] == ["quick.safetensors"]
    other = resolved(spec, fast=True, steps=6, scheduler="ddim", guidance_scale=2, loras=["own.safetensors:0.5"])
    assert (other.steps, other.scheduler, other.guidance_scale) == (6, "ddim", 2.0)
    assert [Path(one.path).name for one in other.loras] == ["quick.safetensors", "own.safetensors"]
    plain, off = resolved(spec, seed=1), resolved(spec, seed=1, fast=False)
    assert off == plain
    assert off.key() == plain.key()
    assert plain.loras == ()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 7}, "quick was made for 6 steps at most, not 7; omit --steps or --fast"),
        ({"refiner": "sdxl-refiner"}, "does not go with a refiner"),
        ({"reuse": 2}, "does not go with reuse"),
        ({"negative_prompt": "a dog"}, "a negative prompt has no effect at guidance scale 1"),
        ({"guidance_interval": "0.2-0.8"}, "guidance_interval has no effect at guidance scale 1"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(registry: Registry, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        resolved(registry.models["mine"], fast=True, **fields)


def test_its_own_lora_once_more_and_a_model_without_a_preset_are_refused(registry: Registry) -> None:
    spec = registry.models["mine"]
    assert spec.fast is not None
    assert spec.fast.lora is not None
    with pytest.raises(UsageError, match="--fast adds the LoRA"):
        resolved(spec, fast=True, loras=[spec.fast.lora.ref.path])
    with pytest.raises(UsageError, match=r"--fast: tiny has no few-step preset \(no `fast` entry"):
        resolved(registry.models["tiny"], fast=True)
    with pytest.raises(UsageError, match="reuse does not go with turbo"):
        resolved(registry.models["sd-turbo"], steps=10, scheduler="ddim", reuse=2)


def test_a_prompts_file_takes_it_line_by_line_and_the_digest_is_that_of_the_lora(registry: Registry) -> None:
    lines = [Line(1, {"prompt": "a", "fast": True}), Line(2, {"prompt": "a"})]
    jobs = list(expand(lines, {"model": "mine", "seed": 1}, registry, num_images=1, base_seed=0))
    fast, plain = (job.request for job in jobs if isinstance(job, ResolvedJob))
    assert fast.steps == 4
    assert len(fast.loras[0].sha256 or "") == 64
    assert (plain.steps, plain.loras) == (25, ())


# Generating


@pytest.mark.slow
def test_an_image_records_it_and_is_generated_again_without_the_preset(sdcli: Run, models_file: Path) -> None:
    common = ("--models-file", models_file, "--size", "64x64", "--quiet")
    made = sdcli("generate", "a cat", "-m", "mine", "--fast", "--seed", "1", "-o", "fast.png", *common)
    assert made.returncode == 0, made.stderr
    lora = models_file.parent / "quick.safetensors"
    explicit = ("--steps", "4", "--scheduler", "lcm", "--guidance-scale", "1", "--lora", lora)
    sdcli("generate", "a cat", "-m", "mine", *explicit, "--seed", "1", "-o", "explicit.png", *common)
    assert (models_file.parent / "fast.png").read_bytes() == (models_file.parent / "explicit.png").read_bytes()

    record = json.loads(sdcli("info", "fast.png", "--json").stdout)
    assert record["provenance"]["fast"] == "quick"
    assert "fast" not in record["request"]
    verified = sdcli("generate", "--from", "fast.png", "--verify", "--models-file", models_file)
    assert verified.returncode == 0, verified.stderr
    again = sdcli("generate", "--from", "fast.png", "-o", "again.png", *common[:2], "--quiet")
    assert again.returncode == 0, again.stderr
    assert (models_file.parent / "again.png").read_bytes() == (models_file.parent / "fast.png").read_bytes()


@pytest.mark.slow
def test_from_an_image_it_decides_the_recorded_settings_anew(sdcli: Run, models_file: Path) -> None:
    common = ("--models-file", models_file, "--size", "64x64", "--quiet")
    slow = ("--steps", "7", "--reuse", "2", "--guidance-scale", "5..3")
    made = sdcli("generate", "a cat", "-m", "mine", "--seed", "1", *slow, "-o", "slow.png", *common)
    assert made.returncode == 0, made.stderr
    shown = sdcli("generate", "--from", "slow.png", "--fast", "--dry-run", *common[:2])
    request = json.loads(shown.stdout)
    assert (request["steps"], request["scheduler"], request["guidance_scale"]) == (4, "lcm", 1.0)
    assert not {"reuse", "guidance_end", "fast"} & set(request)


def test_the_list_and_the_facts_of_a_model_show_it(sdcli: Run, models_file: Path) -> None:
    listed = sdcli("models", "list", "--models-file", models_file).stdout
    assert "[--fast: quick]" in listed
    rows = map(json.loads, sdcli("models", "list", "--json").stdout.splitlines())
    assert {row["name"]: row["fast"] for row in rows}["sdxl"] == "lightning"
    shown = json.loads(sdcli("models", "show", "mine", "--json", "--models-file", models_file).stdout)["fast"]
    assert (shown["name"], shown["steps"], shown["lora_here"]) == ("quick", 4, "yes")
    assert "fast: none" in sdcli("models", "show", "tiny").stdout
