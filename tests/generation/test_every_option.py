"""No option is accepted and ignored: on every kind of model each field changes the image, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sdcli.diffusion.input_images import measure
from sdcli.errors import BadWeights, SdcliError, UsageError
from sdcli.generation.events import Failed, Generated
from sdcli.generation.model_cache import ModelCache
from sdcli.generation.plan import Batch
from sdcli.generation.resolve.jobs import BadJob, expand
from sdcli.generation.run_batch import run_batch
from sdcli.models.registry import load_registry
from sdcli.request.jobs import Line
from sdcli.request.schema import GenerationRequest
from tests.loras import random_pairs, save_diffusers
from tests.models.families.test_pixel_models import ANIMALS, save_pixel_model
from tests.service import cache_of, pipeline_of
from tests.tiny import save_tiny_ip_adapter, save_tiny_pipeline, save_tiny_sd3, save_tiny_sdxl

TEXT = {"prompt": "a (cat:1.4) and pomme", "size": "64x64", "steps": 4, "seed": 1, "scheduler": "ddim"}
PIXELS = {"steps": 4, "seed": 1, "scheduler": "ddim"}
KINDS: dict[str, dict[str, Any]] = {
    "sd1": TEXT | {"guidance_scale": 5.0},
    "sdxl": TEXT | {"guidance_scale": 5.0},
    "sd3": TEXT | {"guidance_scale": 5.0, "scheduler": "flow-euler"},
    "distilled": TEXT | {"guidance_scale": 5.0, "prompt": "a (cat:1.4)"},
    "inpainting": TEXT | {"guidance_scale": 5.0, "init_image": "image.png", "mask": "mask.png"},
    "classes": PIXELS | {"prompt": ANIMALS[0]},
    "unconditional": PIXELS,
}
"""A kind of model -> what is generated with it before one field is changed."""

START = {"init_image": "image.png", "strength": 0.9}
VALUES: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt": ({}, ANIMALS[1]),
    "negative_prompt": ({}, ANIMALS[1]),
    "prompt_template": ({}, "{prompt} in oil"),
    "prompt_syntax": ({}, "plain"),
    "clip_skip": ({}, 3),
    "embeddings": ({}, ["pomme.safetensors=pomme"]),
    "seed": ({}, 2),
    "width": ({"size": None}, 96),
    "height": ({"size": None}, 96),
    "steps": ({}, 3),
    "guidance_scale": ({}, 3.0),
    "scheduler": ({}, "euler-a"),
    "eta": ({}, 1.0),
    "guidance_end": ({}, 1.5),
    "guidance_rescale": ({}, 0.7),
    "guidance_interval": ({}, "0.5-1"),
    "reuse": ({"steps": 6}, 2),
    "pag_scale": ({}, 3.0),
    "variation_seed": ({"variation_strength": 0.5, "variation_seed": 1}, 5),
    "variation_strength": ({"variation_seed": 5, "variation_strength": 0.1}, 0.5),
    "init_image": ({}, "other.png"),
    "strength": ({"init_image": "image.png", "strength": 0.9}, 0.5),
    "mask": (START, "mask.png"),
    "mask_blur": ({**START, "mask": "mask.png", "mask_blur": 0}, 6),
    "invert_mask": ({**START, "mask": "mask.png"}, True),
    "extend": ({**START, "size": None}, "left=8"),
    "upscale": ({}, "2x:0.5"),
    "refiner": ({}, "refiner"),
    "refiner_start": ({"refiner": "refiner", "refiner_start": 0.8}, 0.5),
    "watermark": ({"size": "128x128"}, "A"),
    "loras": ({}, ["lora.safetensors"]),
    "ip_adapters": ({}, ["plain.safetensors=image.png"]),
}
UNUSUAL = {
    ("classes", "prompt_syntax"): "a1111",
    ("unconditional", "prompt_syntax"): "a1111",
    ("inpainting", "mask"): "white.png",
}
"""Where the value above is what a kind of model has anyway."""
REFUSED = {"sd1": {"refiner", "refiner_start"}, "sdxl": {"loras", "ip_adapters"}}
"""All that these kinds do not accept, the files of `loras` and `ip_adapters` being for sd1: one of the two accepts
each field, and its image shows that the field counts."""
ELSEWHERE = {"schema_version", "model", "controls", "guess_mode", "fast"}
"""Fields whose own tests walk the families."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    inpainting = save_tiny_pipeline(root / "inpainting", in_channels=9)
    classes = save_pixel_model(root / "classes", classes=ANIMALS, num_class_embeds=4, sample_size=32)
    return {
        "sd1": save_tiny_pipeline(root / "sd1"),
        "sdxl": save_tiny_sdxl(root / "sdxl"),
        "refiner": save_tiny_sdxl(root / "refiner", refiner=True, zeros_for_empty=False),
        "sd3": save_tiny_sd3(root / "sd3"),
        "distilled": save_tiny_pipeline(root / "distilled", time_cond_proj_dim=32),
        "inpainting": inpainting,
        "classes": classes,
        "unconditional": save_pixel_model(root / "unconditional", sample_size=32),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, colour in (("image.png", "red"), ("other.png", "green")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    Image.new("L", (64, 64), 255).save(folder / "white.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 40)}, folder / "pomme.safetensors")
    return folder


@pytest.fixture(scope="module")
def cache() -> ModelCache:
    return cache_of(dtype="float32", batch_size=1)


def generated(cache: ModelCache, model: Path, files: Path, fields: dict[str, Any]) -> Tensor | SdcliError:
    """The image's pixels, or the error of a request that is refused."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("init_image", "mask"):
        given |= {name: str(files / given[name])} if name in given else {}
    for name in ("embeddings", "loras"):
        given |= {name: [str(files / one) for one in given[name]]} if name in given else {}
    if "refiner" in given:
        given["refiner"] = str(model.parent / given["refiner"])
    if "ip_adapters" in given:
        given |= {
            "ip_adapters": ["=".join(str(files / one) for one in each.split("=")) for each in given["ip_adapters"]]
        }
    line = Line(0, given)
    (job,) = expand([line], {"model": str(model)}, load_registry(), num_images=1, base_seed=0, measure=measure)
    if isinstance(job, BadJob):
        return job.error
    try:
        with cache.lease(job) as lease:
            *_, last = run_batch(lease, Batch.of([job]))
    except SdcliError as error:
        return error
    if isinstance(last, Failed):
        return last.error
    assert isinstance(last, Generated)
    return last.pixels


def test_every_field_is_tried_and_some_kind_of_model_accepts_it() -> None:
    assert set(VALUES) | ELSEWHERE >= set(GenerationRequest.model_fields)
    assert set.intersection(*REFUSED.values()) == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_each_field_changes_the_image_or_is_refused(
    cache: ModelCache, models: dict[str, Path], files: Path, kind: str
) -> None:
    if not (files / "lora.safetensors").exists():
        save_lora(cache, models["sd1"], files / "lora.safetensors")
        save_tiny_ip_adapter(files, models["sd1"])
    bases: dict[str, Tensor | SdcliError] = {}
    refused, ignored, incomparable = set(), [], []
    for name, (context, value) in VALUES.items():
        around, value = KINDS[kind] | context, UNUSUAL.get((kind, name), value)
        after = generated(cache, models[kind], files, around | {name: value})
        if isinstance(after, SdcliError):
            misfit = name == "loras" and isinstance(after, BadWeights)  # a file for other networks
            assert misfit or isinstance(after, UsageError), f"{name} on {kind}: {type(after).__name__}: {after}"
            refused.add(name)
            continue
        key = json.dumps(around)
        bases[key] = before = bases[key] if key in bases else generated(cache, models[kind], files, around)
        if isinstance(before, SdcliError):
            incomparable.append((name, str(before)))
        elif before.shape == after.shape and torch.equal(before, after):
            ignored.append(name)
    assert incomparable == []
    assert ignored == []
    assert refused == REFUSED.get(kind, refused)


def save_lora(cache: ModelCache, model: Path, path: Path) -> None:
    unet = pipeline_of(cache, load_registry().find(str(model))).model.unet
    save_diffusers(path, random_pairs({"unet": unet}, only="attn"))
