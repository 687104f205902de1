"""The safety checker of a model folder: what it flags is told and not saved, never a black image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig

from sdcli.errors import BadWeights
from sdcli.generation.events import Event, Phase, Progress, Result
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.service import generate
from sdcli.generation.settings import OutputSettings
from sdcli.generation.writer import Writer
from sdcli.models.registry import load_registry
from sdcli.models.safety_checker import load_safety_checker
from sdcli.request.jobs import Line
from tests.conftest import Run
from tests.service import cache_of
from tests.tiny import tiny_parts


def save_checked(folder: Path, *, threshold: float) -> Path:
    """A micro model whose checker flags every image (threshold -2, below every cosine) or none (2)."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.concept_embeds.data.normal_()
    checker.special_care_embeds.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    reference = StableDiffusionPipeline(**{**tiny_parts(), "safety_checker": None}, requires_safety_checker=False)
    reference.save_pretrained(folder, safe_serialization=True)
    checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
    index = folder / "model_index.json"
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    return folder


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checked(tmp_path_factory.mktemp("models") / "strict", threshold=-2.0)


@pytest.mark.slow
def test_what_is_flagged_is_told_and_not_saved(strict: Path, tmp_path: Path, sdcli: Run) -> None:
    sample = ("generate", "a cat", "-m", strict, "--size", "64x64", "--steps", "2", "--seed", "1")
    done = sdcli(*sample, "-o", "cat.png", "--json", "-q")
    assert done.returncode == 6
    assert json.loads(done.stdout)["status"] == "flagged"
    assert "flagged the image, so it was not saved (--safety off saves it)" in done.stderr
    assert not (tmp_path / "cat.png").exists()
    off = sdcli(*sample, "-o", "cat.png", "--safety", "off", "-q")
    assert off.returncode == 0, off.stderr
    with Image.open(tmp_path / "cat.png") as image:
        assert max(high for _, high in image.getextrema()) > 0  # type: ignore[misc]


def test_a_lenient_checker_flags_nothing(tmp_path: Path) -> None:
    checker = load_safety_checker(save_checked(tmp_path / "lenient", threshold=2.0))
    assert checker is not None
    assert not checker.flags(Image.new("RGB", (64, 48), "red"))


def events_for(folder: Path, outdir: Path) -> Iterator[Event]:
    fields = {"prompt": "a cat", "model": str(folder), "width": 64, "height": 64, "steps": 2}
    registry = load_registry()
    jobs = [
        job
        for job in expand([Line(0, fields)], {}, registry, num_images=1, base_seed=1)
        if isinstance(job, ResolvedJob)
    ]
    return generate(jobs, cache_of(), Writer(OutputSettings(outdir=outdir)))


def test_a_look_at_what_is_flagged_shows_nothing(strict: Path, tmp_path: Path) -> None:
    looks = []
    for event in events_for(strict, tmp_path):
        if isinstance(event, Progress):
            looks.append(event.preview())
    assert isinstance(event, Result)
    assert event.status == "flagged"
    assert [look is not None and look.getextrema() for look in looks] == [((255, 255),) * 3] * 2


def test_a_checker_that_cannot_be_read_is_found_before_painting(strict: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(strict, tmp_path / "copy")
    (copy / "safety_checker" / "config.json").write_text("{")
    events = events_for(copy, tmp_path / "out")
    assert isinstance(next(events), Phase)
    with pytest.raises(BadWeights, match="--safety off generates without it"):
        next(events)


def test_a_checker_in_parts_is_read(strict: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(strict, tmp_path / "copy")
    whole = StableDiffusionSafetyChecker.from_pretrained(copy / "safety_checker")
    shutil.rmtree(copy / "safety_checker")
    whole.save_pretrained(copy / "safety_checker", max_shard_size="10KB")
    assert len(list((copy / "safety_checker").glob("*.safetensors"))) > 1
    checker = load_safety_checker(copy)
    assert checker is not None
    assert checker.flags(Image.new("RGB", (64, 48), "red"))


def test_a_folder_without_a_checker_has_none(tiny_folder: Path) -> None:
    assert load_safety_checker(tiny_folder) is None


def test_a_checker_that_cannot_be_trusted_or_read_is_an_error(strict: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(strict, tmp_path / "copy")
    weights = copy / "safety_checker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadWeights, match="--safety off generates without it"):
        load_safety_checker(copy)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(BadWeights, match="is a pickle"):
        load_safety_checker(copy)
