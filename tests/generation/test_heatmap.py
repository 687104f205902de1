"""`generate --heatmap`: maps that are probabilities, words that are all of the tokens, and an image that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sdcli.diffusion.attention.maps import AttentionMaps, probabilities
from sdcli.encoders.token_words import Context, find, words_of
from sdcli.encoders.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.errors import SomeFailed, UsageError
from sdcli.generation.observers.heatmap_files import overlay
from sdcli.images.contact_sheet import KEY
from sdcli.io.files import PACKAGE
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.request.input_files import input_files
from tests.generation.test_encode_decode import (
    _here,  # noqa: F401
    good,
    run,
)
from tests.tiny import save_tiny_sdxl


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return load_tokenizer(PACKAGE / "encoders/clip_tokenizer")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(load_registry().find("tiny"), device="cpu", dtype="float32")


@torch.inference_mode()
def watched(model: LoadedModel, condition: Tensor, *, images: int, size: tuple[int, int] = (9, 5)) -> AttentionMaps:
    """The maps of one call of the UNet, not yet taken in; guided where there are more conditions than images."""
    x = torch.randn((images, 4, *size), generator=torch.Generator().manual_seed(0))
    x = x.repeat(len(condition) // images, 1, 1, 1)
    with AttentionMaps(images).recording(model.unet) as maps:
        model.unet(x, torch.tensor(500), encoder_hidden_states=condition)
    return maps


def states(rows: int, *, seed: int = 1) -> Tensor:
    return torch.randn((rows, 7, 32), generator=torch.Generator().manual_seed(seed))


def test_the_maps_are_what_the_layer_itself_weighs_with() -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=24, cross_attention_dim=32, heads=3, dim_head=8)
    hidden, condition = torch.randn(2, 20, 24), torch.randn(2, 7, 32)
    queries, keys = layer.head_to_batch_dim(layer.to_q(hidden)), layer.head_to_batch_dim(layer.to_k(condition))
    theirs = layer.get_attention_scores(queries, keys).unflatten(0, (2, 3)).mean(dim=1)
    torch.testing.assert_close(probabilities(layer, hidden, condition), theirs)


def test_every_map_of_a_layer_and_a_step_is_a_probability(tiny: LoadedModel) -> None:
    maps = watched(tiny, states(2), images=2)
    assert maps._pending
    for weights in maps._pending.values():
        assert float(weights.min()) >= 0
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
    maps.step((9, 5))
    for mean in map(maps.mean, range(2)):
        assert mean.shape == (7, 9, 5)
        torch.testing.assert_close(mean.sum(dim=0), torch.ones(9, 5))


def test_equal_tokens_have_equal_maps_and_a_constant_condition_prefers_none(tiny: LoadedModel) -> None:
    condition = states(1)
    condition[:, 4] = condition[:, 2]
    maps = watched(tiny, condition, images=1)
    maps.step((9, 5))
    torch.testing.assert_close(maps.mean(0)[4], maps.mean(0)[2])
    assert not torch.allclose(maps.mean(0)[3], maps.mean(0)[2])
    maps = watched(tiny, states(1)[:, :1].expand(1, 7, 32), images=1)
    maps.step((9, 5))
    torch.testing.assert_close(maps.mean(0), torch.full((7, 9, 5), 1 / 7))


def test_only_the_conditional_half_counts(tiny: LoadedModel) -> None:
    one, other = (watched(tiny, torch.cat([states(2, seed=seed), states(2)]), images=2) for seed in (5, 6))
    alone = watched(tiny, states(2), images=2)
    for mine, theirs, own in zip(*(maps._pending.values() for maps in (one, other, alone)), strict=True):
        assert len(mine) == 2
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(mine, own)


def test_the_unet_has_its_own_processors_again_whatever_happened(tiny: LoadedModel) -> None:
    before = dict(tiny.unet.attn_processors)
    with pytest.raises(RuntimeError):  # noqa: PT012, SIM117
        with AttentionMaps(1).recording(tiny.unet):
            assert dict(tiny.unet.attn_processors) != before
            tiny.unet(torch.zeros(1, 3, 8, 8), torch.tensor(500), encoder_hidden_states=states(1))
    assert dict(tiny.unet.attn_processors) == before


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["fox", "red", "2024", "don't", ",", "日本", "🦊", "x" * 90])).map(" ".join)
)
def test_every_token_is_of_one_word_or_of_none(tokenizer: ClipTokenizer, text: str) -> None:
    ids = tokenizer(text).ids * 2
    words, apart = words_of(tokenizer, Context(ids))
    places = [place for word in (*words, *apart) for place in word.places]
    assert sorted(places) == list(range(len(ids)))


def test_words_and_phrases_are_found_wherever_they_stand(tokenizer: ClipTokenizer) -> None:
    ids = Context(tokenizer("a Red fox, hippopotamuses in 2024 and the red  FOX; don't").ids)
    words, apart = words_of(tokenizer, ids)
    assert [word.text for word in words] == [
        *("a", "red", "fox", "hippopotamuses", "in", "2024", "and", "the", "don't"),
    ]
    assert {word.text for word in apart} == {"start", "end", "padding", "punctuation"}
    for word in words:
        assert find(tokenizer, ids, word.text) == word
    long = next(word for word in words if word.text == "hippopotamuses")
    assert len(long.places) == 3
    phrase, red, fox = (find(tokenizer, ids, text) for text in ("red fox", "red", "fox"))
    assert phrase is not None
    assert red is not None
    assert fox is not None
    assert sorted(phrase.places) == sorted([*red.places, *fox.places])
    for text in ("cat", "fox red", "hippo", "", "the red fox in"):
        assert find(tokenizer, ids, text) is None


def test_an_embedding_is_found_in_any_case_as_the_prompt_reads_it(tokenizer: ClipTokenizer) -> None:
    (cat,) = tokenizer.words("cat")
    context = Context((tokenizer.start_id, cat, -1, -2, tokenizer.end_id), {"My-Style": range(2)})
    for phrase, places in (("my-style", (2, 3)), ("cat my-style", (1, 2, 3))):
        found = find(tokenizer, context, phrase)
        assert found is not None
        assert found.places == places


def test_an_overlay_goes_from_the_coldest_to_the_hottest_place() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 0.001
    shown = np.asarray(overlay(Image.new("RGB", (64, 64), "gray"), heat)).astype(int).sum(axis=2)
    assert shown[4, 4] > shown[60, 60] + 300
    flat = np.asarray(overlay(Image.new("RGB", (8, 8), "gray"), np.ones((4, 4), np.float32)))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


TINY = ["-m", "tiny", "--seed", "3", "--steps", "3", "--size", "72x40"]


def results(*arguments: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in good("generate", *TINY, "--batch-size", "2", *arguments, "--json")]


def test_guidance_by_perturbed_attention_leaves_the_maps_of_a_step_alone() -> None:
    def tokens(name: str, *more: str) -> np.ndarray:
        results("a cat", "--steps", "1", "-o", f"{name}.png", "--heatmap", "cat", *more)
        with np.load(f"{name}.heatmap/maps.npz") as file:
            return file["tokens"]

    np.testing.assert_array_equal(tokens("plain"), tokens("perturbed", "--pag-scale", "3"))


@pytest.mark.slow
def test_sdxl_with_a_refiner_has_maps_and_traces() -> None:
    base, refiner = save_tiny_sdxl(Path("base")), save_tiny_sdxl(Path("refiner"), refiner=True)
    job = [
        "generate",
        "a cat",
        "-m",
        base,
        "--refiner",
        refiner,
        "--refiner-start",
        "0.5",
        "--steps",
        "4",
        "--seed",
        "1",
    ]
    job += ["--size", "64x64"]
    (plain,) = good(*job, "-o", "plain.png")
    (line,) = good(*job, "-o", "mapped.png", "--heatmap", "all", "--trace", "all", "--preview", "live.png", "--json")
    mapped = json.loads(line)
    assert Path(plain).read_bytes() == Path(mapped["path"]).read_bytes()
    with np.load("mapped.heatmap/maps.npz") as file:
        assert file["words"].tolist()[:2] == ["a", "cat"]
        np.testing.assert_allclose(file["tokens"].sum(axis=0), 1, rtol=1e-5)
    with Image.open(mapped["beside"][0]) as sheet:
        assert [step["of"] for step in json.loads(sheet.info[KEY])["steps"]] == [4] * 4  # type: ignore[index]


@pytest.mark.parametrize(
    "more",
    [
        ["--guidance-scale", "1"],
        ["--guidance-interval", "0.3-0.7", "--upscale", "2x:0.5:latent", "--dtype", "bfloat16"],
    ],
    ids=["unguided", "all at once"],
)
def test_an_image_is_the_same_with_its_maps(more: list[str]) -> None:
    prompts = ["a cat", "a hippopotamuses cat, <b>"]
    plain = results(*prompts, *more, "-o", "plain/{index}")
    mapped = results(*prompts, *more, "-o", "mapped/{index}", "--heatmap", "cat,hippopotamuses,<b>", "--trace", "2")
    for before, after in zip(plain, mapped, strict=True):
        assert Path(before["path"]).read_bytes() == Path(after["path"]).read_bytes()
    first, second = ([Path(path).name for path in result["beside"]] for result in mapped)
    assert first[2:] == ["01-cat.png", "maps.npz", "index.html"]
    assert second[2:] == ["01-cat.png", "02-hippopotamuses.png", "03-b.png", "maps.npz", "index.html"]
    with np.load("mapped/2.heatmap/maps.npz", allow_pickle=False) as file:
        maps = {name: file[name] for name in file.files}
    assert maps["words"].tolist() == ["cat", "hippopotamuses", "<b>"]
    assert maps["tokens"].shape == (77, 5, 9) if len(more) == 2 else (77, 10, 18)
    np.testing.assert_allclose(maps["tokens"].sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(maps["maps"][1], maps["tokens"][2:5].sum(axis=0), rtol=1e-6)
    page = Path("mapped/2.heatmap/index.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b><" not in page.replace("<b><a", "")
    assert "Not in the prompt as the text encoder read it: &lt;b&gt;" in Path("mapped/1.heatmap/index.html").read_text()


@pytest.mark.slow
def test_maps_are_those_of_the_prompt_and_of_one_image_alone() -> None:
    def maps(folder: str, *arguments: str) -> np.ndarray:
        results("-o", f"{folder}/{{index}}", "--heatmap", "cat", "--steps", "1", *arguments)
        with np.load(f"{folder}/1.heatmap/maps.npz") as file:
            return file["tokens"]

    one = maps("one", "a cat", "a cat and a dog", "--negative-prompt", "ugly")
    np.testing.assert_allclose(one, maps("two", "a cat", "--negative-prompt", "pretty"), rtol=1e-4, atol=1e-6)
    assert not np.allclose(one, maps("three", "the cat"), rtol=1e-2)


def test_what_explains_images_is_no_image_of_their_folder() -> None:
    results("a cat", "-o", "out/{index}.png", "--heatmap", "cat", "--trace", "1", "--trace-format", "webp")
    assert len(list(Path("out").rglob("*.*"))) > 4
    found = input_files([Path("out")], suffixes=frozenset({".png", ".webp"}), kind="pictures")
    assert [file.path for file in found] == [Path("out/1.png")]
    named = input_files([Path("out/1.trace.png")], suffixes=frozenset({".png"}), kind="pictures")
    assert [file.path for file in named] == [Path("out/1.trace.png")]


def test_a_resumed_run_maps_what_is_painted_already() -> None:
    Path("jobs.txt").write_text("a cat\n")
    job = ["--prompts-file", "jobs.txt", "-o", "{index}.png"]
    results(*job)
    for status in ("done", "skipped"):
        (result,) = results(*job, "--resume", "--heatmap", "all")
        assert (result["status"], result["path"]) == (status, "1.png")
        assert result["beside"][-1] == "1.heatmap/index.html"


@pytest.mark.parametrize("words", ["", " , ", "dog", "dog,horse"])
def test_words_that_are_not_there_are_refused_before_painting(words: str, tmp_path: Path) -> None:
    assert isinstance(run("generate", "a cat", "-m", "tiny", "--heatmap", words).error, UsageError)
    assert not list(tmp_path.rglob("*.png"))


def test_a_prompt_without_words_has_no_maps() -> None:
    outcome = run("generate", "!!!", "-m", "tiny", "--heatmap", "all")
    assert isinstance(outcome.error, UsageError)


def test_weights_chunks_and_prompts_that_are_joined_have_maps_of_all_their_tokens() -> None:
    job = ["a (cat:1.3) BREAK a [hippopotamuses] AND a dog:0.5", "--prompt-syntax", "a1111"]
    (plain,) = results(*job, "-o", "plain.png")
    (mapped,) = results(*job, "-o", "mapped.png", "--heatmap", "all")
    assert Path(plain["path"]).read_bytes() == Path(mapped["path"]).read_bytes()
    with np.load("mapped.heatmap/maps.npz") as file:
        assert file["words"].tolist() == ["a", "cat", "hippopotamuses", "dog"]
        assert file["tokens"].shape == (2 * 2 * 77, 5, 9)
        np.testing.assert_allclose(file["tokens"].sum(axis=0), 1, rtol=1e-5)
        np.testing.assert_allclose(file["tokens"][: 2 * 77].sum(axis=0), 0.5, rtol=1e-5)
        np.testing.assert_allclose(file["maps"].sum(axis=0) + file["apart_maps"].sum(axis=0), 1, rtol=1e-5)


def test_an_image_without_the_words_fails_alone_and_the_others_stay_the_same() -> None:
    prompts = ["a [cat:dog:0.5]", "a cat", "a horse"]
    plain = results(*prompts, "--batch-size", "3", "-o", "plain/{index}.png")
    outcome = run(*(["generate", *prompts, "--batch-size", "3", "-o", "mapped/{index}.png", "--heatmap", "cat", *TINY]))
    assert isinstance(outcome.error, SomeFailed)
    assert outcome.out == ["mapped/2.png"]
    assert Path("mapped/2.png").read_bytes() == Path(plain[1]["path"]).read_bytes()


def test_a_prompt_that_changes_over_the_steps_has_no_maps() -> None:
    for prompt in ("a [cat:dog:0.5]", "a [cat|dog]"):
        outcome = run("generate", prompt, "-m", "tiny", "--prompt-syntax", "a1111", "--heatmap", "all")
        assert isinstance(outcome.error, UsageError)
        assert "change" in str(outcome.error)


def test_what_was_cut_is_said() -> None:
    long = "a cat " + "very " * 80 + "end"
    results(long, "-o", "long.png", "--heatmap", "cat,end", "--prompt-syntax", "plain")
    page = Path("long.heatmap/index.html").read_text()
    assert "Not in the prompt as the text encoder read it: end" in page
    assert "<s>very" in page
