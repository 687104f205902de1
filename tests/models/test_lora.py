"""LoRAs in generating: three dialects of the same numbers, merged as diffusers and peft merge them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.sampling import sample
from sdcli.errors import BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.events import Event, Note, Result
from sdcli.generation.plan import Limits, plan
from sdcli.generation.resolve.inputs import find_loras
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.io.files import PACKAGE
from sdcli.metadata.a1111 import a1111_text, read_a1111
from sdcli.metadata.read import read_image
from sdcli.models.adapter_files import find_lora
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.lora import ldm_name, lora_facts, read_lora, with_loras
from sdcli.models.registry import load_registry, spec_of_folder
from sdcli.request.fields import LoraRef
from sdcli.request.jobs import Line, read_lines
from sdcli.request.lora_tags import take_tags
from sdcli.request.schema import GenerationRequest, parse_request
from tests.conftest import Run
from tests.ldm import _unet_name
from tests.loras import Pairs, random_pairs, save_diffusers, save_kohya, save_peft
from tests.service import generate_files, indices
from tests.training_runs import captioned_images, train_unet

ATTENTION = "attn"


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(spec_of_folder(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pairs(model: LoadedModel) -> Pairs:
    return random_pairs({"unet": model.unet, "text_encoder": model.text_encoder})


def merged(model: LoadedModel, *loras: Any) -> LoadedModel:
    return with_loras(model, refs(*loras), folder=None)


def refs(*loras: Any) -> tuple[LoraRef, ...]:
    return tuple(LoraRef.model_validate(str(lora)) for lora in loras)


def latents(model: LoadedModel, **fields: Any) -> Tensor:
    asked = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "steps": 3, "scheduler": "ddim", **fields}
    request = resolve(GenerationRequest(**asked, loras=tuple(one.ref for one in model.loras)), model.spec)
    *_, last = sample(Pipeline.of(model), [request])
    return last.latents


# The same numbers in every dialect


def test_the_three_dialects_of_one_lora_give_the_same_latents_bit_for_bit(
    tmp_path: Path, model: LoadedModel, pairs: Pairs
) -> None:
    unet_only = {"unet": pairs["unet"]}
    painted = [
        latents(merged(model, path))
        for path in (
            save_kohya(tmp_path / "kohya.safetensors", unet_only, alpha=2.0),
            save_diffusers(tmp_path / "diffusers.safetensors", unet_only, alpha=2.0),
            save_peft(tmp_path / "peft", unet_only, alpha=2.0),
        )
    ]
    assert torch.equal(painted[0], painted[1])
    assert torch.equal(painted[0], painted[2])
    assert (painted[0] - latents(model)).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_kohyas_and_diffusers_text_encoder_layers_are_the_same(
    tmp_path: Path, model: LoadedModel, pairs: Pairs, alpha: float | None
) -> None:
    kohya = merged(model, save_kohya(tmp_path / "kohya.safetensors", pairs, alpha=alpha))
    diffusers = merged(model, save_diffusers(tmp_path / "diffusers.safetensors", pairs, alpha=alpha))
    assert same_weights(kohya, diffusers)
    layers = sum(map(len, pairs.values()))
    assert [(one.layers, one.unmatched) for one in (*kohya.loras, *diffusers.loras)] == [(layers, ())] * 2


def test_the_oldest_names_of_diffusers_mean_the_same_layers(tmp_path: Path, model: LoadedModel, pairs: Pairs) -> None:
    attention = {
        part: {name: pair for name, pair in layers.items() if "attn" in name} for part, layers in pairs.items()
    }
    old = {}
    for name, (down, up) in attention["unet"].items():
        block, _, kind = name.removesuffix(".0").rpartition(".")
        layer = f"unet.{block}.processor.{kind}_lora"
        old |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    for name, (down, up) in attention["text_encoder"].items():
        block, _, kind = name.rpartition(".")
        layer = f"text_encoder.text_model.{block}.to_{kind.removesuffix('_proj')}_lora"
        old |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    save_file(old, tmp_path / "old.safetensors")
    save_file({key.removeprefix("unet."): old[key] for key in old if "unet" in key}, tmp_path / "procs.safetensors")
    now = merged(model, save_diffusers(tmp_path / "now.safetensors", attention))
    assert same_weights(merged(model, tmp_path / "old.safetensors"), now)
    assert same_weights(merged(model, tmp_path / "procs.safetensors"), now, "unet")


def test_a_lora_of_a_model_that_wraps_the_network_is_merged(tmp_path: Path, model: LoadedModel, pairs: Pairs) -> None:
    plain = save_diffusers(tmp_path / "plain.safetensors", {"unet": pairs["unet"]})
    wrapped = {f"base_model.model.diffusion_model.{k.removeprefix('unet.')}": t for k, t in load_file(plain).items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    assert same_weights(merged(model, plain), merged(model, tmp_path / "wrapped.safetensors"))


def test_the_original_codes_names_of_a_unet_are_those_of_its_layers() -> None:
    """Of Stable Diffusion 1.5; the other direction is written down in tests/ldm.py."""
    from diffusers import UNet2DConditionModel

    config = json.loads((PACKAGE / "models/families/configs/sd1" / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(layers) > 200
    for layer in layers:
        ours = ldm_name(layer, layers_per_block=2, attended=frozenset({1, 2, 3}))
        assert f"{ours}.weight" == _unet_name(f"{layer}.weight")


def test_kohyas_files_may_name_the_unets_layers_as_the_original_code(
    tmp_path: Path, model: LoadedModel, pairs: Pairs
) -> None:
    """The tiny UNet has attention in the block of its first upsampler, so that is number 2 there."""
    unet = pairs["unet"]
    original = {ldm_name(name, layers_per_block=1, attended=frozenset({0})): pair for name, pair in unet.items()}
    assert "output_blocks.1.2.conv" in original
    one = merged(model, save_kohya(tmp_path / "original.safetensors", {"unet": original}))
    other = merged(model, save_kohya(tmp_path / "diffusers.safetensors", {"unet": unet}))
    assert not one.loras[0].unmatched
    assert same_weights(one, other)


def same_weights(one: LoadedModel, other: LoadedModel, *parts: str) -> bool:
    """Whether the parts hold equal bits."""
    return all(
        torch.equal(weight, other.parts[part].get_parameter(name))
        for part in parts or one.parts
        for name, weight in one.parts[part].named_parameters()
    )


# Oracles


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_kohya, save_diffusers])
def test_latents_equal_those_of_diffusers_with_the_lora_fused(
    tmp_path: Path, tiny_folder: Path, model: LoadedModel, save: Any
) -> None:
    networks = {"unet": model.unet, "text_encoder": model.text_encoder}
    file = save(tmp_path / "lora.safetensors", random_pairs(networks, only=ATTENTION), alpha=1.5)
    reference = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(file)
    reference.fuse_lora(lora_scale=0.7)
    pipeline = merged(model, f"{file}:0.7")
    from sdcli.diffusion.scheduler_factory import make_scheduler

    reference.scheduler = make_scheduler("ddim", model.scheduler_config)
    expected = reference(
        "a cat",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    ours = latents(pipeline)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (ours - latents(model)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_is_merged_as_peft_does(tmp_path: Path, model: LoadedModel, rslora: bool) -> None:
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    special = next(name for name, _ in model.unet.named_modules() if name.endswith("attn1.to_q"))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut"],
        rank_pattern={special: 2},
        alpha_pattern={special: 5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    wrapped = get_peft_model(deepcopy(model.unet), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    found = merged(model, tmp_path / "adapter")
    assert not found.loras[0].unmatched
    for name, weight in found.unet.named_parameters():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    assert not torch.equal(found.unet.get_parameter(f"{special}.weight"), model.unet.get_parameter(f"{special}.weight"))


@pytest.mark.parametrize("with_mid", [False, True])
def test_a_convolutions_lora_is_the_sum_of_two_ways(tmp_path: Path, model: LoadedModel, with_mid: bool) -> None:
    """conv(x) + scale * up(mid(down(x))): the definition, computed as convolutions."""
    x, layer = torch.randn(1, 32, 9, 9, generator=torch.Generator().manual_seed(1)), "down_blocks.0.resnets.0.conv1"
    old: Any = model.unet.get_submodule(layer)
    generator = torch.Generator().manual_seed(0)
    rank = 3
    down = torch.randn(rank, 32, *((1, 1) if with_mid else (3, 3)), generator=generator)
    mid = torch.randn(rank, rank, 3, 3, generator=generator)
    up = torch.randn(32, rank, 1, 1, generator=generator)
    name = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    tensors |= {"lora_mid.weight": mid} if with_mid else {}
    save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "conv.safetensors")
    new: Any = merged(model, f"{tmp_path / 'conv.safetensors'}:0.4").unet.get_submodule(layer)
    low = F.conv2d(F.conv2d(x, down), mid, padding=1) if with_mid else F.conv2d(x, down, padding=1)
    expected = old(x) + 0.4 * 1.5 / rank * F.conv2d(low, up)
    assert torch.allclose(new(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_a_lora_that_was_trained_here_gives_the_trained_network(tmp_path: Path) -> None:
    run = tmp_path / "run"
    images = captioned_images(tmp_path / "pictures", 2)
    train_unet(images, run, max_train_steps=2, rank=2, lora_alpha=4.0, learning_rate=1e-2)
    trained = load_model(spec_of_folder(run), device="cpu", dtype="float32")
    tiny = load_model(load_registry().find("tiny"), device="cpu", dtype="float32")
    for file in ("pytorch_lora_weights", "lora_kohya"):
        found = merged(tiny, run / "current" / f"{file}.safetensors")
        assert not found.loras[0].unmatched
        for name, weight in found.unet.named_parameters():
            assert torch.allclose(weight, trained.unet.get_parameter(name), atol=1e-6), name
    assert not same_weights(found, tiny, "unet")


# Weights


def test_weights_scale_and_negative_ones_take_away(tmp_path: Path, model: LoadedModel, pairs: Pairs) -> None:
    file = save_kohya(tmp_path / "a.safetensors", pairs)
    name = "conv_in.weight"
    base = model.unet.get_parameter(name)
    once, back, half = (merged(model, f"{file}:{w}").unet.get_parameter(name) for w in (1, -1, 0.5))
    assert torch.allclose(once + back, 2 * base, atol=1e-6)
    assert torch.allclose(half - base, (once - base) / 2, atol=1e-6)
    assert not torch.allclose(once, base, atol=1e-2)


def test_a_weight_of_zero_changes_nothing_and_each_part_has_its_own(
    tmp_path: Path, model: LoadedModel, pairs: Pairs
) -> None:
    file = save_kohya(tmp_path / "a.safetensors", pairs)
    assert same_weights(merged(model, f"{file}:0"), model)
    unet_alone, text_alone = merged(model, f"{file}:1:0"), merged(model, f"{file}:0:1")
    assert same_weights(unet_alone, model, "text_encoder")
    assert not same_weights(unet_alone, model, "unet")
    assert same_weights(text_alone, model, "unet")
    assert not same_weights(text_alone, model, "text_encoder")


def test_the_model_itself_stays_as_it_is_and_shares_what_the_lora_does_not_touch(
    tmp_path: Path, model: LoadedModel, pairs: Pairs
) -> None:
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    found = merged(model, save_kohya(tmp_path / "a.safetensors", pairs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    assert found.unet.conv_in.weight is not model.unet.conv_in.weight
    assert found.unet.conv_in.bias is model.unet.conv_in.bias
    assert found.vae is model.vae


def test_several_loras_add_up(tmp_path: Path, model: LoadedModel, pairs: Pairs) -> None:
    one = save_kohya(tmp_path / "one.safetensors", pairs)
    two = save_kohya(tmp_path / "two.safetensors", random_pairs({"unet": model.unet}, seed=1, rank=5))
    base = model.unet.conv_in.weight
    alone = [merged(model, file).unet.conv_in.weight - base for file in (one, two)]
    together = merged(model, one, two).unet.conv_in.weight - base
    assert torch.allclose(together, alone[0] + alone[1], atol=1e-6)


def test_a_half_precision_weight_is_rounded_once_after_the_sum(tmp_path: Path, tiny_folder: Path) -> None:
    half = load_model(spec_of_folder(tiny_folder), device="cpu", dtype="bfloat16")
    pairs = random_pairs({"unet": half.unet}, only="conv_in")
    found = merged(half, save_kohya(tmp_path / "a.safetensors", pairs)).unet.conv_in.weight
    down, up = pairs["unet"]["conv_in"]
    weight = half.unet.conv_in.weight
    expected = (weight.float() + (up.flatten(1) @ down.flatten(1)).view_as(weight)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert found.stride() == weight.stride()


def test_a_weight_for_a_part_that_the_lora_does_not_change_is_refused(
    tmp_path: Path, model: LoadedModel, pairs: Pairs
) -> None:
    file = save_kohya(tmp_path / "a.safetensors", {"unet": pairs["unet"]})
    with pytest.raises(UsageError, match=r"nothing for the text encoder, so its own weight of 0\.5"):
        merged(model, f"{file}:1:0.5")
    merged(model, f"{file}:0.5")
    merged(model, f"{file}:0.5:0")


# The service


def jobs_of(*lines: dict[str, Any], **expanding: Any) -> list[ResolvedJob | BadJob]:
    typed = {"model": "tiny", "seed": 3, "steps": 2}
    numbered = [Line(number, fields) for number, fields in enumerate(lines, 1)]
    return list(expand(numbered, typed, load_registry(), num_images=1, base_seed=1, **expanding))


def painted(folder: Path, jobs: list[Any], **run: Any) -> list[Event]:
    assert all(isinstance(job, ResolvedJob) for job in jobs), jobs
    return generate_files(jobs, folder, template="{index}", run={"batch_size": 1, **run})


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA folder with two for the registry's tiny model."""
    folder = tmp_path_factory.mktemp("loras")
    networks = dict(load_model(load_registry().find("tiny"), device="cpu").parts)
    networks.pop("vae")
    save_kohya(folder / "one.safetensors", random_pairs(networks, only=ATTENTION), alpha=3.0)
    save_diffusers(folder / "two.safetensors", random_pairs(networks, seed=1, only=ATTENTION))
    return folder


@pytest.mark.slow
def test_jobs_with_other_loras_in_one_run_are_each_as_if_alone(tmp_path: Path, loras: Path) -> None:
    one, two = loras / "one.safetensors", loras / "two.safetensors"
    asked: list[dict[str, Any]] = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "loras": [f"{one}"]},
        {"prompt": "a cat", "loras": [f"{two}:-0.5", f"{one}:0.5:1"]},
        {"prompt": "a dog"},
    ]
    painted(tmp_path / "together", jobs_of(*asked))
    for number, fields in list(enumerate(asked, 1))[1:]:
        painted(tmp_path / str(number), jobs_of(fields))
        assert (tmp_path / "together" / f"{number}.png").read_bytes() == (tmp_path / str(number) / "1.png").read_bytes()
    assert len({path.read_bytes() for path in (tmp_path / "together").iterdir()}) == 4


def test_batches_hold_jobs_with_the_same_loras(loras: Path) -> None:
    lora = str(loras / "one.safetensors")
    asked = [{"prompt": "x"}, {"prompt": "y", "loras": [lora]}, {"prompt": "z"}, {"prompt": "w", "lora": f"{lora}:1"}]
    jobs: Any = jobs_of(*asked)
    assert indices(plan(jobs, Limits())) == [[1, 3], [2, 4]]


@pytest.mark.slow
def test_a_lora_that_fits_in_part_is_told_and_one_that_does_not_fails_its_jobs_alone(
    tmp_path: Path, loras: Path
) -> None:
    tensors = load_file(loras / "one.safetensors")
    other = {"lora_unet_no_such_layer.lora_down.weight": torch.ones(1, 2)}
    other |= {"lora_unet_no_such_layer.lora_up.weight": torch.ones(2, 1), "stray": torch.ones(1)}
    save_file({**tensors, **other}, tmp_path / "part.safetensors")
    wide = {name: tensor[:, :3].contiguous() if "lora_down" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    events = painted(
        tmp_path / "out",
        jobs_of(
            {"prompt": "a", "loras": [str(tmp_path / "wide.safetensors")]},
            {"prompt": "b", "loras": [str(tmp_path / "part.safetensors")]},
            {"prompt": "c", "loras": [str(tmp_path / "part.safetensors")]},
        ),
    )
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1
    assert "2 of its names have no place in tiny and no effect, first lora_unet_no_such_layer" in notes[0]
    results = [event for event in events if isinstance(event, Result)]
    assert [result.status for result in results] == ["failed", "done", "done"]
    assert "made for another model family" in str(results[0].error)


@pytest.mark.slow
def test_a_lora_paints_with_the_lcm_scheduler(tmp_path: Path, loras: Path) -> None:
    fields = {"prompt": "a cat", "scheduler": "lcm", "steps": 4, "guidance_scale": 1.0}
    *_, result = painted(tmp_path, jobs_of({**fields, "loras": [str(loras / "one.safetensors")]}))
    assert isinstance(result, Result)
    assert result.status == "done"


def test_a_painter_refuses_a_request_with_other_loras_than_its_own(model: LoadedModel) -> None:
    request = resolve(GenerationRequest(prompt="x", seed=1, steps=2, width=64, height=64, loras=refs("a")), model.spec)
    with pytest.raises(UsageError, match="other LoRAs"):
        next(iter(sample(Pipeline.of(model), [request])))


# Files that cannot be merged


KOHYA = "lora_unet_conv_in"
BROKEN: dict[str, tuple[dict[str, Tensor], type[SdcliError], str]] = {
    "none of the layers": (
        {"lora_unet_x.lora_down.weight": torch.ones(1, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 1)},
        BadWeights,
        "none of its 1 layers is in .*another model family",
    ),
    "no LoRA at all": ({"weight": torch.ones(3)}, BadWeights, "holds no LoRA"),
    "no tensors": ({}, BadWeights, "holds no LoRA"),
    "half a pair": ({f"{KOHYA}.lora_down.weight": torch.ones(1, 4, 3, 3)}, BadWeights, "holds no LoRA"),
    "another shape": (
        {f"{KOHYA}.lora_down.weight": torch.ones(1, 9, 3, 3), f"{KOHYA}.lora_up.weight": torch.ones(32, 1, 1, 1)},
        BadWeights,
        "32x4x3x3; the LoRA was made for another model family",
    ),
    "two ranks": (
        {f"{KOHYA}.lora_down.weight": torch.ones(2, 4, 3, 3), f"{KOHYA}.lora_up.weight": torch.ones(32, 1, 1, 1)},
        BadWeights,
        "damaged: its two weights are of the ranks 1 and 2",
    ),
    "rank zero": (
        {f"{KOHYA}.lora_down.weight": torch.ones(0, 4, 3, 3), f"{KOHYA}.lora_up.weight": torch.ones(32, 0, 1, 1)},
        BadWeights,
        "not a pair of matrices",
    ),
    "NaN": (
        {
            f"{KOHYA}.lora_down.weight": torch.full((1, 4, 3, 3), torch.nan),
            f"{KOHYA}.lora_up.weight": torch.ones(32, 1),
        },
        BadWeights,
        "not finite",
    ),
    "an alpha that is none": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(1, 4, 3, 3),
            f"{KOHYA}.lora_up.weight": torch.ones(32, 1),
            f"{KOHYA}.alpha": torch.tensor(torch.inf),
        },
        BadWeights,
        "alpha inf",
    ),
    "DoRA": ({f"{KOHYA}.dora_scale": torch.ones(1)}, UsageError, "is DoRA"),
    "peft's DoRA": ({"unet.conv_in.lora_magnitude_vector": torch.ones(1)}, UsageError, "is DoRA"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(1)}, UsageError, "is LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(1)}, UsageError, "is LoKr"),
    "differences": ({f"{KOHYA}.diff_b": torch.ones(1)}, UsageError, "is a file of whole differences"),
    "a checkpoint": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, BadWeights, "holds no LoRA"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_merged_is_refused_with_a_sentence(tmp_path: Path, model: LoadedModel, case: str) -> None:
    tensors, error, sentence = BROKEN[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(error, match=sentence):
        merged(model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        ({"use_dora": True}, UsageError, "is DoRA"),
        ({"peft_type": "LOHA"}, UsageError, "is LOHA"),
        ({"fan_in_fan_out": True}, UsageError, "transposed"),
        ({"alpha_pattern": {"(a+)+$": 1}}, UsageError, "is an expression"),
        ({"lora_alpha": "16"}, BadWeights, "alpha '16', which is not a number"),
        ({"lora_alpha": True}, BadWeights, "not a number"),
    ],
)
def test_a_peft_folder_of_another_kind_is_refused(
    tmp_path: Path, model: LoadedModel, pairs: Pairs, config: dict[str, Any], error: type[SdcliError], sentence: str
) -> None:
    folder = save_peft(tmp_path / "adapter", {"unet": pairs["unet"]}, **config)
    with pytest.raises(error, match=sentence):
        merged(model, folder)


def test_hostile_files_are_refused_by_their_headers(tmp_path: Path, loras: Path) -> None:
    whole = (loras / "one.safetensors").read_bytes()
    for name, data, sentence in (
        ("cut", whole[:-10], "cut short"),
        ("pickle", b"\x80\x02" + bytes(100), "is a pickle.*models convert"),
        ("empty", b"", "is not a safetensors file"),
        ("huge", (2**62).to_bytes(8, "little") + whole, "not a safetensors file"),
        ("shapeless", whole.replace(b'"shape"', b'"shame"', 1), "no shape"),
    ):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(BadWeights, match=sentence):
            read_lora(tmp_path / f"{name}.safetensors")
    (tmp_path / "old.pt").write_bytes(whole)
    with pytest.raises(UsageError, match="models convert"):
        find_lora(str(tmp_path / "old.pt"), None)
    save_file({"x": torch.ones(1)}, tmp_path / "meta.safetensors", metadata={"lora_adapter_metadata": "{" * 10})
    with pytest.raises(BadWeights, match="not JSON"):
        read_lora(tmp_path / "meta.safetensors")


def test_a_folder_without_the_two_files_and_a_path_to_nothing_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without adapter_config\.json"):
        find_lora(str(tmp_path), None)
    for path in ("nothing.safetensors", "x" * 4000, "../no", "~nobody/x", "/dev/null"):
        with pytest.raises(NotFound, match="no file"):
            find_lora(path, tmp_path)


def test_a_lora_given_as_a_model_is_pointed_to_the_flag_and_shown_as_one(loras: Path) -> None:
    with pytest.raises(BadWeights, match="generate with it by --lora"):
        load_model(load_registry().find(str(loras / "one.safetensors")), device="cpu")
    facts = lora_facts(loras / "one.safetensors")
    assert facts is not None
    assert (facts["dialect"], facts["ranks"]) == ("kohya", [3])
    assert min(facts["unet_layers"], facts["text_encoder_layers"]) > 0
    assert lora_facts(PACKAGE / "starter" / "unet" / "diffusion_pytorch_model.safetensors") is None


# As asked and as recorded


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
    | st.from_regex(r"\A[a-c](:[0-9.e]{1,4}){0,4}\Z"),
    st.floats(-100, 100),
    st.floats(-100, 100),
)
def test_a_lora_is_read_back_from_its_flags_spelling(path: str, unet: float, text: float) -> None:
    ref = LoraRef(path=path, unet_weight=unet, text_weight=text)
    assert LoraRef.model_validate(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1, 1)),
        ("a:0.8", ("a", 0.8, 0.8)),
        ("dir/a.safetensors:-.5:2", ("dir/a.safetensors", -0.5, 2)),
        ("C:\\a.safetensors:1e-1", ("C:\\a.safetensors", 0.1, 0.1)),
        ("a:b:0.3", ("a:b", 0.3, 0.3)),
        ("a:nan", ("a:nan", 1, 1)),
    ],
)
def test_weights_stand_behind_the_file(text: str, expected: tuple[str, float, float]) -> None:
    ref = LoraRef.model_validate(text)
    assert (ref.path, ref.unet_weight, ref.text_weight) == expected


@pytest.mark.parametrize("bad", ["", "a:101", {"path": "a", "unet_weight": float("nan")}, {"path": "a", "x": 1}, 3])
def test_a_lora_that_cannot_be_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match=r"^loras"):
        parse_request({"loras": [bad]})


def test_a_request_without_loras_has_the_key_and_the_record_that_it_always_had() -> None:
    request = parse_request({"prompt": "x", "loras": []})
    assert "loras" not in request.typed()
    assert request.key() == parse_request({"prompt": "x"}).key()


def test_tags_are_taken_out_of_the_prompt_by_the_web_uis_rules() -> None:
    prompt, found = take_tags("a cat <lora:x:0.8> in a hat<lora:y> <lora:z:0.3:0.6><lora:w:unet=2:te=0>")
    assert prompt == "a cat in a hat"
    weights = [(ref.path, ref.text_weight, ref.unet_weight) for ref in found]
    assert weights == [("x", 0.8, 0.8), ("y", 1, 1), ("z", 0.3, 0.6), ("w", 0, 2)]
    assert take_tags("a <b> <3 c < d: e > f <: g") == ("a <b> <3 c < d: e > f <: g", ())
    assert take_tags("a <lyco:x:0.8> b")[1] == take_tags("a <lora:x:0.8> b")[1]


@pytest.mark.parametrize(
    "tag", ["<lora:>", "<lora:x:much>", "<lora:x:1:2:3>", "<lora:x:dyn=4>", "<lora:x:500>", "<lora:"]
)
def test_a_tag_that_means_nothing_is_refused(tag: str) -> None:
    with pytest.raises(UsageError, match=r"^<lora:"):
        take_tags(f"a cat {tag}")


def test_a_tag_becomes_a_lora_of_the_folder_with_its_digest(loras: Path) -> None:
    (job,) = jobs_of({"prompt": "a cat <lora:one:0.8>", "prompt_template": "{prompt} <lora:two:-1>"}, lora_dir=loras)
    assert isinstance(job, ResolvedJob)
    request = job.request
    assert (request.prompt, request.prompt_template) == ("a cat", "{prompt}")
    assert [str(ref) for ref in request.loras] == ["one:0.8", "two:-1"]
    (given_as_file,) = jobs_of({"prompt": "a cat", "loras": [str(loras / "one.safetensors")]})
    assert isinstance(given_as_file, ResolvedJob)
    assert given_as_file.request.loras[0].sha256 == request.loras[0].sha256


def test_a_tag_without_a_file_names_the_folder_and_a_near_name(loras: Path) -> None:
    (bad,) = jobs_of({"prompt": "a cat <lora:onne:0.8>"}, lora_dir=loras)
    assert isinstance(bad, BadJob)
    assert isinstance(bad.error, UsageError)
    assert str(bad.error) == f"line 1: no LoRA 'onne' in {loras}; did you mean 'one'?"
    for outside in ("<lora:../loras/one>", f"<lora:{loras}/one>", "<lora:..>"):
        (bad,) = jobs_of({"prompt": outside}, lora_dir=loras)
        assert isinstance(bad, BadJob)


def test_a_line_of_a_prompt_file_may_have_several(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat --lora a:0.5 --steps 3 --lora b\n")
    (line,) = read_lines(str(tmp_path / "p.txt"))
    assert [str(ref) for ref in parse_request(line.fields).loras] == ["a:0.5", "b:1"]


def test_the_text_of_the_web_ui_has_tags_and_hashes_and_is_read_back() -> None:
    fields = {"prompt": "a cat", "steps": 3, "seed": 1, "width": 64, "height": 64, "prompt_template": "{prompt}"}
    asked = parse_request({**fields, "loras": ["dir/one.safetensors:0.8", "two:0.5:-1"]})
    text = a1111_text(asked, version="1", lora_hashes={"one": "0123456789ab", "two": "ba9876543210"})
    prompt, last = text.split("\n")
    assert prompt == "a cat <lora:one:0.8> <lora:two:-1:0.5>"
    assert 'Lora hashes: "one: 0123456789ab, two: ba9876543210", Version' in last
    foreign = read_a1111(text)
    assert foreign is not None
    assert foreign.request is not None
    assert foreign.request.prompt == "a cat"
    assert [str(ref) for ref in foreign.request.loras] == ["one:0.8", "two:0.5:-1"]
    unreadable = read_a1111(text.replace("<lora:one:0.8>", "<lora:one:x>"))
    assert unreadable is not None
    assert unreadable.unmapped["lora"].startswith("<lora:one:x>")


@pytest.mark.slow
def test_an_image_remembers_its_loras_and_verifies_until_the_file_is_another(tmp_path: Path, loras: Path) -> None:
    folder = tmp_path / "loras"
    shutil.copytree(loras, folder)
    painted(tmp_path, jobs_of({"prompt": "a cat <lora:one:0.8>"}, lora_dir=folder), lora_dir=folder)
    image, run = tmp_path / "1.png", RunSettings(device="cpu", lora_dir=folder)
    info = read_image(image)
    assert info.record is not None
    assert info.parameters is not None
    (ref,), (facts,) = info.record.request.loras, info.record.provenance["loras"]
    assert (str(ref), ref.sha256, facts["name"]) == ("one:0.8", facts["sha256"], "one")
    assert f'Lora hashes: "one: {facts["tensors_sha256"][:12]}"' in info.parameters
    assert verify_image(image, load_registry(), run).identical
    shutil.copy(folder / "two.safetensors", folder / "one.safetensors")
    with pytest.raises(UsageError, match="is another file than the one"):
        verify_image(image, load_registry(), run)
    with pytest.raises(UsageError, match="is another file than the one"):
        find_loras(info.record.request, folder)


def test_the_flag_may_be_typed_several_times(sdcli: Run, loras: Path, tmp_path: Path) -> None:
    command = ("generate", "a cat <lora:two>", "-m", "tiny", "--lora-dir", loras, "--lora", "one:0.5", "--dry-run")
    done = sdcli(*command, "--lora", f"{loras / 'two.safetensors'}:0.1:0.2", "--seed", "1")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert request["prompt"] == "a cat"
    assert [(ref["unet_weight"], ref["text_weight"]) for ref in request["loras"]] == [(0.5, 0.5), (0.1, 0.2), (1, 1)]
    assert all(len(ref["sha256"]) == 64 for ref in request["loras"])


def test_what_another_tools_image_names_and_is_not_here_is_told(sdcli: Run, loras: Path, tmp_path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", "a cat <lora:one:0.8> <lora:gone:1>\nSteps: 3, Sampler: DDIM, Seed: 1, Size: 64x64")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    done = sdcli("generate", "--from", "a.png", "-m", "tiny", "--lora-dir", loras, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [ref["path"] for ref in json.loads(done.stdout)["loras"]] == ["one"]
    assert f"no LoRA 'gone' in {loras}" in done.stderr
