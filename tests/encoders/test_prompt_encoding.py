"""What the denoiser is told for a prompt with syntax: weights, chunks, steps, composition, layers and embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdcli.diffusion.guidance import composed, guided
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.predict import steps_by_timestep
from sdcli.diffusion.sampling import sample, scheduler_for
from sdcli.encoders.conditioning import emphasised
from sdcli.errors import BadWeights, NotFound, SdcliError, UsageError
from sdcli.generation.resolve.jobs import ResolvedJob, expand
from sdcli.generation.resolve.resolve import resolve
from sdcli.generation.settings import RunSettings
from sdcli.generation.verify import verify_image
from sdcli.metadata.read import read_image
from sdcli.metadata.record import parse_record
from sdcli.models.families import CLASS_CONDITIONAL
from sdcli.models.families.family import ModelKind
from sdcli.models.loader import load_model
from sdcli.models.registry import Registry, load_registry, spec_of_folder
from sdcli.request.fields import EmbeddingRef
from sdcli.request.jobs import Line
from sdcli.request.prompt_syntax import Chunk
from sdcli.request.schema import GenerationRequest, parse_request
from tests import service
from tests.schedulers import DIFFUSION_SCHEDULERS
from tests.service import generate_images, results
from tests.tiny import with_parts


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Pipeline:
    return Pipeline.of(load_model(spec_of_folder(tiny_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    text_encoder = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder")
    return text_encoder.eval(), CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")


def asked(pipeline: Pipeline, prompt: str, **fields: Any) -> GenerationRequest:
    return resolve(GenerationRequest(**{"prompt": prompt, "seed": 3, "steps": 4, **fields}), pipeline.model.spec)


def told(pipeline: Pipeline, prompt: str, *, step: int = 1, **fields: Any) -> Tensor:
    """The hidden states [1, L, D] of a prompt."""
    request = asked(pipeline, prompt, **fields)
    return pipeline.encode([request], guided=False, steps=4).at(step).inputs["encoder_hidden_states"]


def latents(pipeline: Pipeline, prompt: str, **fields: Any) -> list[Tensor]:
    """x after every call of the network."""
    return [step.latents for step in sample(pipeline, [asked(pipeline, prompt, **fields)])]


# Weights and chunks


@pytest.mark.parametrize("prompt", ["", "a red fox, sitting", "eine Füchsin, 狐", "x " * 75, "a \\(fox\\)"])
def test_without_weights_the_states_are_those_of_the_plain_prompt_bit_for_bit(tiny: Pipeline, prompt: str) -> None:
    plain = told(tiny, prompt.replace("\\", ""), prompt_syntax="plain")
    assert plain.shape == (1, 77, 32)
    assert torch.equal(told(tiny, prompt), plain)


def test_weights_scale_the_states_of_their_tokens_and_keep_the_mean(tiny: Pipeline) -> None:
    factors = torch.ones(77, 1)
    factors[2] = 1.5
    states = torch.randn((1, 77, 8), generator=torch.Generator().manual_seed(0)) + 0.1
    expected = states * factors
    weighted = emphasised(states, Chunk((5, 6), (1.0, 1.5)))
    assert torch.allclose(weighted, expected * (states.mean() / expected.mean()), atol=1e-6)
    assert float(weighted.mean()) == pytest.approx(float(states.mean()), abs=1e-6)
    # an untrained network's states have no mean that could be restored
    assert torch.allclose(told(tiny, "a (red:1.5) fox"), told(tiny, "a red fox") * factors, atol=1e-6)


def test_a_long_prompt_is_the_states_of_its_chunks_side_by_side(tiny: Pipeline) -> None:
    halves = ["fox owl cat " * 25, "red hat dog"]
    expected = torch.cat([told(tiny, half) for half in halves], dim=1)
    assert torch.equal(told(tiny, "".join(halves)), expected)
    assert torch.equal(told(tiny, "a fox BREAK an owl"), torch.cat([told(tiny, "a fox"), told(tiny, "an owl")], dim=1))


def test_the_shorter_of_prompt_and_negative_prompt_is_padded_with_the_empty_one(tiny: Pipeline) -> None:
    request = asked(tiny, "a BREAK b BREAK c", negative_prompt="d", guidance_scale=3)
    negative, positive = tiny.encode([request], guided=True, steps=4).at(1).inputs["encoder_hidden_states"]
    assert torch.equal(positive, told(tiny, request.prompt)[0])
    assert torch.equal(negative, torch.cat([told(tiny, text) for text in ("d", "", "")], dim=1)[0])
    assert tiny.encode.shape(request) == ((3, 1),)


def test_plain_prompts_are_text_and_cut(tiny: Pipeline) -> None:
    words = "(a:1.5) [b|c] AND " + "x " * 100
    assert torch.equal(told(tiny, words, prompt_syntax="plain"), told(tiny, words + "more", prompt_syntax="plain"))
    assert not torch.equal(told(tiny, "(a:1.5)", prompt_syntax="plain"), told(tiny, "a"))


# Steps


@pytest.mark.parametrize("scheduler", DIFFUSION_SCHEDULERS)
def test_an_edited_prompt_paints_the_first_text_up_to_its_step_and_then_the_other(
    tiny: Pipeline, scheduler: str
) -> None:
    fox, owl, edited = (
        latents(tiny, prompt, scheduler=scheduler, steps=6, guidance_scale=3)
        for prompt in ("a fox", "an owl", "[a fox:an owl:3]")
    )
    steps = steps_by_timestep(scheduler_for(tiny.model, asked(tiny, "", scheduler=scheduler, steps=6)).timesteps, 6)
    first_calls = next(n for n, t in enumerate(_timesteps(tiny, scheduler)) if steps[t] > 3)
    assert sorted(steps.values()) == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(edited[:first_calls], fox[:first_calls], strict=True))
    assert not torch.equal(edited[first_calls], fox[first_calls])
    assert not torch.equal(edited[-1], owl[-1])


def _timesteps(pipeline: Pipeline, scheduler: str) -> list[float]:
    return [
        float(t) for t in scheduler_for(pipeline.model, asked(pipeline, "", scheduler=scheduler, steps=6)).timesteps
    ]


@pytest.mark.parametrize(
    ("edited", "same"),
    [
        ("[a fox:an owl:0]", "an owl"),
        ("[a fox:an owl:1]", None),
        ("[a fox:an owl:1.0]", "a fox"),
        ("[an owl::99]", "an owl"),
        ("[owl|owl]", "owl"),
    ],
)
def test_texts_that_do_not_change_are_as_if_written_once(tiny: Pipeline, edited: str, same: str | None) -> None:
    equal = [torch.equal(a, b) for a, b in zip(latents(tiny, edited), latents(tiny, same or "a fox"), strict=True)]
    assert equal == [True] * 4 if same else [True, False, False, False]


def test_the_steps_are_those_of_the_pass(tiny: Pipeline, tmp_path: Path) -> None:
    """Half of the noise means half of the steps, and a second pass has its own."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    started = {"init_image": str(tmp_path / "red.png"), "strength": 0.5, "steps": 8, "width": 32, "height": 32}
    assert asked(tiny, "a", **started, upscale="2x:0.25").passes == (4, 2)
    fox, edited = (latents(tiny, text, **started) for text in ("a fox", "[a fox:an owl:0.5]"))
    assert [torch.equal(a, b) for a, b in zip(edited, fox, strict=True)] == [True, True, False, False]
    twice = {"steps": 4, "width": 32, "height": 32, "upscale": "2x:0.5"}
    fox, edited = (latents(tiny, text, **twice) for text in ("a fox", "[a fox:an owl:4]"))
    assert [torch.equal(a, b) for a, b in zip(edited, fox, strict=True)] == [True] * 6
    edited = latents(tiny, "[a fox:an owl:1]", **twice)
    assert [torch.equal(a, b) for a, b in zip(edited, fox, strict=True)] == [True] + [False] * 5


def test_alternation_tells_another_word_at_each_step_also_in_the_negative_prompt(tiny: Pipeline) -> None:
    for step, word in enumerate(["fox", "owl", "cat", "fox"], start=1):
        assert torch.equal(told(tiny, "a [fox|owl|cat]", step=step), told(tiny, f"a {word}"))
    request = asked(tiny, "a", negative_prompt="[fox|owl]", guidance_scale=2)
    conditions = tiny.encode([request], guided=True, steps=4)
    assert conditions.changes
    assert torch.equal(conditions.at(4).inputs["encoder_hidden_states"][:1], told(tiny, "owl"))


# AND


def test_composition_is_the_formula_of_liu_et_al() -> None:
    x, outputs = torch.randn(2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    weights = [(1.0, 0.5), (0.3, -2.0)]
    result = guided(composed(lambda x, t: outputs.flatten(0, 1), weights), lambda t: 4.0)(x, torch.tensor(1))
    for row in range(2):
        unconditional, first, second = outputs[:, row]
        expected = unconditional + 4 * (
            weights[0][row] * (first - unconditional) + weights[1][row] * (second - unconditional)
        )
        assert torch.allclose(result[row], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("composition", "same", "scale"),
    [("a fox AND an owl:0", "a fox", 3), ("a fox:0.5 AND a fox :.5", "a fox", 3), ("a fox AND a fox", "a fox", 6)],
)
def test_weights_of_and_add_up(tiny: Pipeline, composition: str, same: str, scale: float) -> None:
    ours = latents(tiny, composition, guidance_scale=3)[-1]
    assert torch.allclose(ours, latents(tiny, same, guidance_scale=scale)[-1], atol=1e-3)


def test_outside_the_guidance_interval_and_composes_at_a_scale_of_one(tiny: Pipeline) -> None:
    fields: dict[str, Any] = {"guidance_interval": "0.5-1", "guidance_scale": 3, "negative_prompt": "x BREAK y"}
    for composition, same in (("a fox AND an owl:0", "a fox"), ("a fox:0.5 AND a fox:0.5", "a fox")):
        ours, theirs = latents(tiny, composition, **fields), latents(tiny, same, **fields)
        assert torch.allclose(ours[-1], theirs[-1], atol=1e-3)
    mixed = [asked(tiny, prompt, **fields) for prompt in ("a", "a BREAK b")]
    assert tiny.encode.shape(mixed[0]) == tiny.encode.shape(mixed[1])
    assert len(generate_images(tiny, mixed, batch_size=2)) == 2


def test_and_without_guidance_and_syntax_without_a_text_encoder_are_refused(tiny: Pipeline) -> None:
    with pytest.raises(UsageError, match="AND needs guidance"):
        asked(tiny, "a AND b", guidance_scale=1)
    classes = tiny.model.spec.model_copy(
        update={"family": CLASS_CONDITIONAL, "kind": ModelKind(classes=("(cat)",), null_label=1)}
    )
    assert resolve(GenerationRequest(prompt="(cat)"), classes).prompt_syntax == "plain"
    for fields in ({"prompt_syntax": "a1111"}, {"clip_skip": 2}, {"embeddings": ("x.safetensors",)}):
        with pytest.raises(UsageError, match=f"{next(iter(fields))} has no effect"):
            resolve(GenerationRequest(prompt="(cat)", **fields), classes)


# Layers


def test_clip_skip_takes_an_earlier_layer_as_transformers_gives_it(
    tiny: Pipeline, oracle: tuple[CLIPTextModel, CLIPTokenizer]
) -> None:
    model, tokenizer = oracle
    ids = tokenizer("a red fox", padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
        for skip in (1, 2, 3):
            assert torch.equal(told(tiny, "a red fox", clip_skip=skip), model.final_layer_norm(states[-skip]))
    with pytest.raises(UsageError, match="has 3 layers, so not 4"):
        tiny.encode.shape(asked(tiny, "a", clip_skip=4))


# Embeddings


def saved(path: Path, **tensors: Tensor) -> str:
    save_file(tensors, path)
    return str(path)


VECTORS = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
LAYOUTS: dict[str, Callable[[Path], str]] = {
    "a1111": lambda path: saved(path, emb_params=VECTORS),
    "diffusers": lambda path: saved(path, **{"<my-cat>": VECTORS}),
    "sdxl": lambda path: saved(path, clip_l=VECTORS, clip_g=torch.zeros(2, 48)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_embedding_is_what_transformers_computes_with_its_vectors_in_the_vocabulary(
    tiny: Pipeline, oracle: tuple[CLIPTextModel, CLIPTokenizer], tmp_path: Path, layout: str
) -> None:
    model, tokenizer = oracle
    path = LAYOUTS[layout](tmp_path / "cat.safetensors")
    rows = model.embeddings.token_embedding.weight
    ids = tokenizer("a thing one two hat", padding="max_length", return_tensors="pt").input_ids
    placeholders = ids[0, 3:5].tolist()
    kept = rows[placeholders].clone()
    with torch.inference_mode():
        rows[placeholders] = VECTORS
        expected = model(ids).last_hidden_state
        rows[placeholders] = kept
    embeddings = (EmbeddingRef(path=path, token="<my-cat>"),)
    assert torch.equal(told(tiny, "a thing <MY-cat> hat", embeddings=embeddings), expected)
    assert not torch.equal(told(tiny, "a thing (<my-cat>:1.2) hat", embeddings=embeddings), expected)


@pytest.mark.parametrize(
    ("spelling", "prompt", "error", "sentence"),
    [
        ("{good}", "a dog", UsageError, "no prompt has the word 'good'"),
        ("{good}=a b", "a b", UsageError, "cannot be a word"),
        ("{folder}/none.safetensors", "none", NotFound, "none.safetensors"),
        ("{folder}/none.pt", "none", UsageError, "not a .safetensors file"),
        ("{wide}", "wide", UsageError, "its vectors have 33 numbers, .* have 32"),
        ("{many}", "many", UsageError, "has 76 vectors; .* reads 75"),
        ("{nan}", "nan", BadWeights, "not finite"),
        ("{deep}", "deep", BadWeights, r"should be \[vectors, width\]"),
        ("{pair}", "pair", BadWeights, "it has 2 tensors"),
        ("{text}", "text", BadWeights, "not a safetensors file"),
    ],
)
def test_an_embedding_that_cannot_be_used_is_refused_with_a_sentence(
    tiny: Pipeline, tmp_path: Path, spelling: str, prompt: str, error: type[SdcliError], sentence: str
) -> None:
    files = {
        "good": {"x": VECTORS},
        "wide": {"x": torch.zeros(1, 33)},
        "many": {"x": torch.zeros(76, 32)},
        "nan": {"x": torch.full((1, 32), torch.nan)},
        "deep": {"x": torch.zeros(1, 1, 32)},
        "pair": {"x": VECTORS, "y": VECTORS.clone()},
    }
    paths = {name: saved(tmp_path / f"{name}.safetensors", **tensors) for name, tensors in files.items()}
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    spelling = spelling.format(**paths, folder=tmp_path, text=tmp_path / "text.safetensors")
    with pytest.raises(error, match=sentence):
        tiny.encode.shape(asked(tiny, prompt, embeddings=(spelling,)))


def test_an_embedding_is_remembered_by_its_digest(tiny: Pipeline, tmp_path: Path) -> None:
    request = asked(tiny, "good", embeddings=(saved(tmp_path / "good.safetensors", x=VECTORS),))
    (embedding,) = request.embeddings
    assert (embedding.token, len(embedding.sha256 or "")) == ("good", 64)
    assert resolve(parse_request(json.loads(json.dumps(request.typed()))), tiny.model.spec) == request
    os.utime(saved(tmp_path / "good.safetensors", x=VECTORS * 2), ns=(0, 0))  # a clock may tick slower than this test
    with pytest.raises(UsageError, match="is another file than the one that was generated with"):
        resolve(request, tiny.model.spec)
    with pytest.raises(UsageError, match="is another file than the one that was generated with"):
        tiny.encode.shape(request)
    twice = tuple(f"{tmp_path}/good.safetensors={word}" for word in ("Cat", "cat"))
    with pytest.raises(UsageError, match="two of them have the word 'cat'"):
        asked(tiny, "cat", embeddings=twice)


# Batches and records

LONG = "a fox, " * 40
MIXED = ["a cat", LONG, "a dog", "a cat AND a dog:0.5", LONG + " an owl", "[a cat:a dog:2]"]


def test_images_of_other_lengths_do_not_pad_each_other(tiny: Pipeline) -> None:
    requests = [asked(tiny, prompt, width=16, height=16) for prompt in MIXED]
    together = generate_images(tiny, requests, batch_size=6)
    assert [(one.batch_size, one.batch_index) for one in together] == [(3, 0), (2, 0), (3, 1), (1, 0), (2, 1), (3, 2)]
    for one, request in zip(together, requests, strict=True):
        (alone,) = generate_images(tiny, [request])
        assert (one.pixels - alone.pixels).abs().max() <= 2 / 255


@pytest.mark.slow
def test_each_image_of_a_split_batch_verifies_in_the_company_it_had(tmp_path: Path) -> None:
    registry = load_registry()
    generate_files(registry, tmp_path, MIXED[:3])
    for path in (tmp_path / "2.png", tmp_path / "3.png"):
        assert verify_image(path, registry, RunSettings(device="cpu")).identical


def test_an_image_of_an_earlier_version_is_painted_the_same(tmp_path: Path) -> None:
    registry = load_registry()
    generate_files(registry, tmp_path, ["a (red:1.5) [cat|dog]"], prompt_syntax="plain")
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        record = json.loads(image.text["sdcli"])
        assert record["request"].pop("prompt_syntax") == "plain"
        record["request"]["schema"] = 1
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("sdcli", json.dumps(record))
        image.save(tmp_path / "old.png", pnginfo=chunks)
    assert parse_record(json.dumps(record)).request.prompt_syntax == "plain"
    assert verify_image(tmp_path / "old.png", registry, RunSettings(device="cpu")).identical
    assert parse_request({"prompt": "a"}).prompt_syntax is None, "what says no schema is of the newest"
    request = read_image(path).request
    assert request is not None
    assert request.prompt_syntax == "plain"


def generate_files(registry: Registry, folder: Path, prompts: list[str], **typed: Any) -> None:
    lines = [Line(0, {"prompt": prompt}) for prompt in prompts]
    options = {"model": "tiny", "seed": 7, "steps": 2, **typed}
    jobs = [job for job in expand(lines, options, registry, num_images=1, base_seed=5) if isinstance(job, ResolvedJob)]
    found = results(service.generate_files(jobs, folder, template="{index}", run={"batch_size": 4}))
    assert [result.error for result in found] == [None] * len(prompts)


def test_a_distilled_model_refuses_and_and_a_second_scale(tiny: Pipeline) -> None:
    unet = tiny.model.unet
    distilled = replace(tiny, model=with_parts(tiny.model, unet=unet))
    config = dict(unet.config)
    try:
        unet.register_to_config(time_cond_proj_dim=8)
        with pytest.raises(UsageError, match="was distilled without guidance, so AND"):
            list(sample(distilled, [asked(tiny, "a AND b", guidance_scale=3)]))
        with pytest.raises(UsageError, match="was distilled without guidance end"):
            list(sample(distilled, [asked(tiny, "a", guidance_scale=3, guidance_end=0)]))
    finally:
        unet.register_to_config(time_cond_proj_dim=config["time_cond_proj_dim"])
