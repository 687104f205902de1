"""The scripts that make the starter's data and judge it, on a few drawn sprites and without a network."""

from __future__ import annotations

import importlib
import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sdcli.data.sources import open_images
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.training.config_files import settings_from
from sdcli.training.text_encoder.settings import TextSettings
from sdcli.training.unet.settings import UnetSettings
from sdcli.training.vae.settings import VaeSettings
from sdcli.vae.autoencoder import cell
from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts" / "starter"
NAMES = (
    "words", "scenes", "judge", "evaluate", "texts", "wordnet", "meanings", "synonyms", "sprites", "assemble", "parts",
    "train", "sharpness", "pairs", "perception", "enlarge",
)  # fmt: skip

THINGS = [
    ("horse", "animals-nature", "animal-mammal", "brown"),
    ("dog", "animals-nature", "animal-mammal", "orange"),
    ("cat", "animals-nature", "animal-mammal", "grey"),
    ("ewe", "animals-nature", "animal-mammal", "silver"),
    ("astronaut", "people-body", "person-role", "white"),
    ("cook", "people-body", "person-role", "pink"),
    ("robot", "smileys-emotion", "face-costume", "blue"),
    ("red apple", "food-drink", "food-fruit", "red"),
    ("banana", "food-drink", "food-fruit", "yellow"),
    ("automobile", "travel-places", "transport-ground", "red"),
    ("bicycle", "travel-places", "transport-ground", "green"),
    ("house", "travel-places", "place-building", "tan"),
    ("full moon", "travel-places", "sky-weather", "gold"),
    ("star", "travel-places", "sky-weather", "yellow"),
    ("hammer", "objects", "tool", "purple"),
    ("tulip", "animals-nature", "plant-flower", "magenta"),
    ("grinning face", "smileys-emotion", "face-smiling", "gold"),
]
STYLES = ("fluent-emoji", "fluent-emoji-flat", "noto", "twemoji")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, which import each other as when Python runs one of them."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sprites.py would have written: a disc or a square for each thing and style."""
    return drawn_work(tmp_path_factory.mktemp("work"), 128)


@pytest.fixture(scope="module")
def large_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same things, as `sprites.py --side 256` would have drawn them."""
    return drawn_work(tmp_path_factory.mktemp("large"), 256)


def drawn_work(folder: Path, side: int) -> Path:
    pixels, lines, scale = [], [], side // 128
    for number, (label, group, subgroup, colour) in enumerate(THINGS):
        for style in STYLES[: 3 if label == "cook" else 4]:
            image = Image.new("RGBA", (side, side))
            draw = ImageDraw.Draw(image)
            box = (10 * scale, 4 * (number % 8) * scale, 118 * scale - 1, 118 * scale - 1)
            (draw.ellipse if number % 2 else draw.rectangle)(box, fill=colour)
            pixels.append(np.frombuffer(image.convert("RGBa").tobytes(), np.uint8).reshape(side, side, 4))
            facts = {"label": label, "style": style, "group": group, "subgroup": subgroup}
            lines.append(json.dumps(facts | {"tags": ["puppy", "thing", label.split()[-1]]}))
    np.save(folder / "sprites.npy", np.stack(pixels))
    (folder / "sprites.json").write_text("\n".join(lines))
    return folder


def test_a_scene_depends_on_its_seed_and_number_alone(scripts: dict[str, ModuleType], work: Path) -> None:
    first, again = scripts["scenes"].Composer(work), scripts["scenes"].Composer(work)
    [first.scene(3, number) for number in range(20)]
    for number in (19, 4):
        scene, image = first.scene(3, number)
        same, same_image = again.scene(3, number)
        assert scene.captions == same.captions
        assert np.array_equal(image, same_image)
    assert not np.array_equal(first.scene(3, 1)[1], first.scene(4, 1)[1])


def test_no_caption_has_a_word_that_measures_meaning_or_a_combination_that_is_held_out(
    scripts: dict[str, ModuleType], work: Path
) -> None:
    scenes, words = scripts["scenes"], scripts["words"]
    composer, source = scenes.Composer(work), random.Random(0)
    held = 0
    for kind in scenes.KINDS:
        for _ in range(300):
            scene = composer.plan(kind, source)
            assert 1 <= len(scene.captions) <= 3
            assert len(set(scene.captions)) == len(scene.captions)
            for caption in scene.captions:
                assert not words.UNSEEN_WORD.search(caption), caption
                assert caption == caption.strip()
                assert "  " not in caption
            labels = scene.labels
            if kind == "pair":
                assert not words.is_held_out(*sorted(labels))
            elif kind == "ride":
                assert not words.is_held_out(labels[0], "rides", labels[1])
                assert labels != ("astronaut", "horse")
            elif kind == "place":
                assert not words.is_held_out(labels[0], scene.place)
            elif kind == "count":
                assert len(set(labels)) == 1
                assert not words.is_held_out(labels[0], str(len(labels)))
                assert len(scene.placed) == len(labels) == int(scene.attribute)
            elif kind == "recoloured":
                assert not words.is_held_out(labels[0], scene.attribute)
                assert all(scene.attribute in caption for caption in scene.captions)
    for a in THINGS:
        held += sum(words.is_held_out(a[0], place) for place in scenes.PLACES)
    assert 5 < held < 40, "about every tenth of 187"


def test_the_held_out_style_is_never_drawn(scripts: dict[str, ModuleType], work: Path) -> None:
    composer, source = scripts["scenes"].Composer(work), random.Random(1)
    styles = [json.loads(line)["style"] for line in (work / "sprites.json").read_text().splitlines()]
    drawn = {
        styles[placed.sprite]
        for kind in scripts["scenes"].KINDS
        for _ in range(100)
        for placed in composer.plan(kind, source).placed
    }
    assert drawn == set(STYLES[:3])


def test_images_show_what_the_scene_says(scripts: dict[str, ModuleType], work: Path) -> None:
    scenes = scripts["scenes"]
    composer, source = scenes.Composer(work), random.Random(2)
    for _ in range(30):
        image = composer.draw(composer.plan("plain", source), source)
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        assert (image[0, 0] == 255).all(), "white behind it"
    for _ in range(30):
        scene = composer.plan("recoloured", source)
        hue = scenes.HUES[scene.attribute][0]
        pixels = Image.fromarray(composer.draw(scene, source)).convert("HSV").crop((54, 54, 74, 74))
        found = np.asarray(pixels)[..., 0].astype(float).mean() * 360 / 256
        assert abs((found - hue + 180) % 360 - 180) < 25, (scene, found)


def test_a_laid_sprite_has_no_rim_of_another_colour(scripts: dict[str, ModuleType], work: Path) -> None:
    """Resizing premultiplied colours as if they were not would darken or lighten the edge."""
    scenes = scripts["scenes"]
    sprite = np.zeros((128, 128, 4), np.uint8)
    sprite[30:90, 30:90] = 255
    canvas = scenes.plain((255, 255, 255))
    scenes.blend(canvas, sprite, 64, 64, 70.3)
    assert np.allclose(canvas, 255, atol=1.01), "white on white stays white"
    before = canvas.copy()
    scenes.blend(canvas, sprite, -300, 64, 40)
    assert np.array_equal(canvas, before), "a sprite outside of the canvas changes nothing"


def test_a_scene_of_256_pixels_is_that_of_128_in_more_detail(
    scripts: dict[str, ModuleType], work: Path, large_work: Path
) -> None:
    scenes, pairs = scripts["scenes"], scripts["pairs"]
    small, large = scenes.Composer(work), scenes.Composer(large_work)
    source = random.Random(4)
    for kind in scenes.KINDS:
        for _ in range(6):
            scene, seed = small.plan(kind, source), source.random()
            image, detailed = small.draw(scene, random.Random(seed)), large.draw(scene, random.Random(seed))
            assert detailed.shape == (256, 256, 3)
            reduced = pairs.halved(detailed[None])[0].permute(1, 2, 0).numpy() * 255
            error = np.abs(reduced - image).mean()
            assert error < 5, (scene, error)
    for place, draw in scenes.LANDSCAPES.items():
        one, two = (draw(random.Random(1), scale) for scale in (1, 2))
        assert np.abs(two.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3)) - one).mean() < 3, place


def test_the_width_of_an_outline_is_that_of_the_blur(scripts: dict[str, ModuleType]) -> None:
    width = scripts["sharpness"].outline_width
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    radius = ((x - 128).square() + (y - 125).square()).sqrt()

    def disc(sigma: float, contrast: float = 1.0) -> torch.Tensor:
        return (1 - contrast * torch.special.ndtr((60 - radius) / sigma)).expand(1, 3, -1, -1)

    for sigma in (1.0, 2.0, 3.0):
        assert width(disc(sigma)) == pytest.approx(2.56 * sigma, abs=0.3)
    assert width(disc(2, 0.5)) == pytest.approx(2.56 * 2, abs=0.3), "independent of the contrast"
    assert np.isnan(width(disc(2, 0.1))), "too faint"


@pytest.fixture(scope="module")
def half_vae() -> AutoencoderTiny:
    """A VAE of the starter's latents for images of 128x128, as the starter's was before it was enlarged."""
    torch.manual_seed(1)
    widths = (32,) * 4
    vae = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
    )
    return vae.requires_grad_(False)


def test_an_enlarged_vae_starts_with_the_old_latents_and_the_old_image(
    scripts: dict[str, ModuleType], large_work: Path, half_vae: AutoencoderTiny
) -> None:
    torch.manual_seed(0)
    new = scripts["enlarge"].enlarged(half_vae)
    assert cell(new) == 16
    image = scripts["scenes"].Composer(large_work).scene(1, 2)[1][None]
    large = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        wanted = half_vae.encoder(scripts["pairs"].halved(image) * 2 - 1)
        found = new.encoder(large)
        assert found.shape == wanted.shape == (1, 8, 16, 16)
        assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()
        drawn = new.decoder(wanted)
        enlarged = torch.nn.functional.interpolate(half_vae.decoder(wanted), scale_factor=2.0)
        assert drawn.shape == (1, 3, 256, 256)
        assert (drawn - enlarged).square().mean().sqrt() < 0.02
        # a window is that part of the whole, except near its inner borders
        window = scripts["enlarge"].decode_window(new.decoder, wanted, torch.tensor([[0, 16]]))
        assert torch.allclose(window[..., :40, -40:], drawn[..., :40, -40:], atol=1e-3)


@pytest.mark.slow
def test_latents_return_from_the_unet_the_nearer_the_less_noise_was_added(
    scripts: dict[str, ModuleType], large_work: Path, half_vae: AutoencoderTiny
) -> None:
    pairs = scripts["pairs"]
    model = load_model(load_registry().find("starter"), device="cpu", dtype="float32")
    denoise = pairs.Denoise(replace(model, parts={**model.parts, "vae": half_vae}))
    images, latents = pairs.shard(scripts["scenes"].Composer(large_work), denoise, 3, range(4))
    assert images.shape == (4, 256, 256, 3)
    assert latents.shape == (4, 3, 8, 16, 16)
    clean, light, heavy = (latents[:, kind].astype(np.float32) for kind in range(3))
    assert 0.02 < np.abs(light - clean).mean() < np.abs(heavy - clean).mean()
    almost = denoise(torch.from_numpy(clean), ["a horse"] * 4, [0.002] * 4, seed=1)
    assert np.abs(almost.numpy() - clean).mean() < 0.06


def test_perception_compares_images_and_its_windows_have_their_truth(
    scripts: dict[str, ModuleType], large_work: Path
) -> None:
    perception = scripts["perception"]
    composers = {s: scripts["scenes"].Composer(large_work, styles=[s], shares=[1]) for s in STYLES[:3]}
    images, truth = perception.windows(composers, random.Random(0), 8)
    assert images.shape == (8, 3, 128, 128)
    assert images.abs().max() <= 1
    assert (truth.amax(0) < torch.tensor([len(THINGS), 3, 4])).all()
    torch.manual_seed(0)
    network = perception.Perception(len(THINGS)).eval()
    assert torch.equal(network.distance(images, images), torch.zeros(8))
    near, far = (network.distance(images, perception.blurred(images, size)).mean() for size in (2, 5))
    assert 0 < near < far


def test_training_of_perception_continues_as_if_it_had_not_been_interrupted(
    scripts: dict[str, ModuleType], large_work: Path, tmp_path: Path
) -> None:
    train = scripts["perception"].train
    for name in ("sprites.npy", "sprites.json"):
        (tmp_path / name).symlink_to(large_work / name)
    for steps in (1, 2):  # the first step is the same in both
        interrupted = train(tmp_path, steps=steps, batch=4, every=1)
    (tmp_path / "perception-state.pt").unlink()
    whole = train(tmp_path, steps=2, batch=4)
    assert interrupted.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, interrupted.state_dict()[name]), name


def test_the_learning_rate_of_an_enlarged_vae_rises_stays_and_falls_to_zero(scripts: dict[str, ModuleType]) -> None:
    plan = scripts["enlarge"].Plan(steps=1000, batch=1, encoder_steps=0, sharpen_start=0)
    rates = [plan.rate(step, encoder=False) for step in range(1001)]
    assert rates[0] == 0.01
    assert rates[100:700] == [1.0] * 600
    assert rates[850] == pytest.approx(0.5)
    assert rates[1000] == 0
    assert plan.rate(5, encoder=True) == 0, "an encoder that is not trained at all"


@pytest.mark.slow
def test_training_an_enlarged_vae_continues_as_if_it_had_not_been_interrupted(
    scripts: dict[str, ModuleType], tmp_path: Path, half_vae: AutoencoderTiny
) -> None:
    enlarge = scripts["enlarge"]
    (tmp_path / "pairs").mkdir()
    noise = np.random.default_rng(0)
    np.save(tmp_path / "pairs" / "000-images.npy", noise.integers(0, 255, (3, 256, 256, 3), np.uint8))
    np.save(tmp_path / "pairs" / "000-latents.npy", noise.normal(size=(3, 3, 8, 16, 16)).astype(np.float16))
    pairs = enlarge.Pairs(tmp_path / "pairs")
    plan = enlarge.Plan(steps=4, batch=1, encoder_steps=2, sharpen_start=1)
    torch.manual_seed(0)
    network = scripts["perception"].Perception(17).eval().requires_grad_(False)

    def perception() -> Any:
        return network

    whole = enlarge.Training(plan, half_vae, perception)
    before = {name: value.clone() for name, value in whole.vae.state_dict().items()}
    for _ in range(3):
        whole.advance(pairs)
    assert all(
        not torch.equal(value, before[name]) for name, value in whole.vae.state_dict().items() if "weight" in name
    )
    assert set(whole.figures) == {"encoder", "l1", "structure", "perception", "real", "fake"}

    first = enlarge.Training(plan, half_vae, perception)
    first.advance(pairs)
    first.save(tmp_path)
    second = enlarge.Training(plan, half_vae, perception)
    second.load(tmp_path)
    assert second.step == 1
    second.advance(pairs)
    second.advance(pairs)
    for name, value in whole.vae.state_dict().items():
        assert torch.equal(value, second.vae.state_dict()[name]), name
    assert second.figures == whole.figures
    saved = AutoencoderTiny.from_pretrained(tmp_path / "vae")
    assert cell(saved) == 16


def test_shards_are_read_by_the_trainers_and_a_longer_set_goes_on_from_a_shorter_one(
    tmp_path: Path, work: Path, scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = scripts["scenes"]
    monkeypatch.setattr(scenes, "SHARD", 8)
    for shard in scenes.missing_shards(work, tmp_path, seed=5, count=16):
        scenes.write_shard(shard)
    images = open_images(tmp_path)
    assert len(images) == 16
    scene, drawn = scenes.Composer(work).scene(5, 9)
    assert images[9].captions == scene.captions
    (number,) = [n for n in range(16) if images[n].name.endswith("00500000009")]
    with tarfile.open(tmp_path / "005-00001.tar") as tar:
        assert np.array_equal(np.asarray(Image.open(tar.extractfile("00500000009.png"))), drawn)  # type: ignore[arg-type]
    assert number == 9
    assert [shard.start for shard in scenes.missing_shards(work, tmp_path, seed=5, count=24)] == [16]
    crop = scenes.most_detailed_crop(drawn, 32, random.Random(0))
    assert crop.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("name", "plural"),
    [("dog", "dogs"), ("mouse", "mice"), ("fox", "foxes"), ("cherry", "cherries"), ("cup of tea", "cups of tea"),
     ("bus", "buses"), ("french fries", "french fries"), ("wine glass", "wine glasses"), ("sheep", "sheep"),
     ("house with a garden", "houses with a garden"), ("monkey", "monkeys"), ("star", "stars")],
)  # fmt: skip
def test_plurals(scripts: dict[str, ModuleType], name: str, plural: str) -> None:
    assert scripts["words"].plural(name) == plural


@pytest.mark.slow
def test_texts_of_the_text_encoder_have_the_words_that_captions_leave_out(
    scripts: dict[str, ModuleType], work: Path, tmp_path: Path
) -> None:
    texts = scripts["texts"]
    wordnet = small_wordnet(tmp_path / "dict")
    assert scripts["wordnet"].counts(wordnet) == {"dog": 42}
    lines = list(texts.dictionary(wordnet, random.Random(0)))
    assert {"dog", "domestic dog"} <= set(lines)
    assert any(re.fullmatch(r"an? (domestic )?dog riding an? (domestic )?dog", line) for line in lines)
    names = texts.names(scripts["scenes"].Composer(work))
    assert {"a puppy", "puppies", "a car", "red apples"} <= set(names)


def small_wordnet(folder: Path) -> Path:
    """A few lines in WordNet's format."""
    folder.mkdir()
    (folder / "data.noun").write_text(
        "  1 This software and database is being provided to you\n"
        '02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; "the dog barked"\n'
        "02083346 05 n 02 canine 0 canid 0 000 | any of various fissiped mammals\n"
        "00023271 09 n 01 cognition 0 000 | the psychological result of perception\n"
        "09616922 18 n 01 dog(a) 0 000 | someone who is morally reprehensible\n"
    )
    (folder / "index.noun").write_text(
        "  1 This software and database is being provided to you\n"
        "canid n 1 1 ~ 1 0 02083346\n"
        "canine n 1 1 ~ 1 0 02083346\n"
        "cognition n 1 0 1 0 00023271\n"
        "dog n 2 1 @ 2 1 02084071 09616922\n"
        "domestic_dog n 1 1 @ 1 0 02084071\n"
    )
    (folder / "data.adj").write_text("00001740 00 a 01 able 0 000 | having the necessary means\n")
    (folder / "data.verb").write_text("00001740 29 v 01 breathe 0 000 | draw air into the lungs\n")
    (folder / "cntlist.rev").write_text("dog%1:05:00:: 1 42\nbark%2:32:00:: 1 3\n")
    return folder


def test_wordnet_gives_synonyms_and_the_hypernym(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    nouns = scripts["wordnet"].Nouns(small_wordnet(tmp_path / "dict"))
    assert nouns.with_synonyms("dog") == "dog, domestic dog, canine"
    assert nouns.thing("dogs") == nouns.thing("dog"), "a plural"
    assert nouns.with_synonyms("cognition") == "cognition", "not a thing"
    assert nouns.with_synonyms("zebra") == "zebra", "not in this dictionary"
    phrased = scripts["meanings"].phrasings("domestic dog", nouns)
    full = "domestic dog, dog, canine"
    assert set(phrased) == {"domestic dog", "a domestic dog", "domestic dogs"}
    assert set(phrased.values()) == {("a domestic dog", full, f"{full}, a member of the genus canis")}


def test_a_meaning_is_the_mean_of_the_teachers_vectors(scripts: dict[str, ModuleType]) -> None:
    table = {"a": torch.tensor([1.0, 0]), "b": torch.tensor([0, 1.0])}
    found = scripts["meanings"].meaning_vectors(lambda texts: torch.stack([table[text] for text in texts]), {
        "x": ("a",), "y": ("a", "b"), "z": ("b", "a", "b"),
    })  # fmt: skip
    wanted = torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0.2**0.5, 0.8**0.5]])
    assert torch.allclose(found, wanted, atol=1e-3)


def test_a_synonym_is_near_to_its_name_and_a_caption_has_it_in_its_place(
    scripts: dict[str, ModuleType], work: Path
) -> None:
    composer, synonyms = scripts["scenes"].Composer(work), scripts["synonyms"]
    names = [name for concept in composer.concepts for name in concept.names]
    words = ["poodle", "arabian", "tabby", "nothing", "dog", "green", "dog house", "police dog"]
    texts = list(dict.fromkeys(scripts["words"].singular(text) for text in (*names, *words)))
    rows = {text: row for row, text in enumerate(texts)}
    vectors = torch.eye(len(texts))
    near = {
        "poodle": "dog",
        "arabian": "horse",
        "tabby": "cat",
        "green": "dog",
        "dog house": "dog",
        "police dog": "dog",
    }
    for word, name in near.items():
        row = rows[scripts["words"].singular(word)]
        vectors[row] = torch.nn.functional.normalize(vectors[row] + 3 * vectors[rows[f"a {name}"]], dim=0)
    found = synonyms.synonyms(composer, words, rows, vectors)
    assert found == {"dog": ("poodle", "police dog"), "horse": ("arabian",), "cat": ("tabby",)}

    assert ["an horse", "an arabian"] in list(synonyms.words(found, {}))  # the word alone makes the difference
    assert list(synonyms.words(found, {"tabby": 3})).count(["cats", "tabbies"]) == synonyms.COMMON_WEIGHT
    assert list(synonyms.words(found, {})).count(["dogs", "poodles", "police dogs"]) == 1
    lists = list(synonyms.captions(composer, found, {}, random.Random(1), 300))
    assert len(lists) == 300
    both = [pair for pair in lists if len(pair) == 2]
    assert len(both) > 30
    for first, other in both:
        synonym = next(word for words in found.values() for word in words if word in other)
        name = next(name for name, words in found.items() if synonym in words)
        assert other.replace(synonym, name, 1) == first
        assert not re.search(r"\ba arabian|\ban (poodle|police|tabby)", other)


@pytest.mark.slow
def test_prompts_ask_for_what_was_trained_and_for_what_was_held_out(scripts: dict[str, ModuleType], work: Path) -> None:
    evaluate, words = scripts["evaluate"], scripts["words"]
    prompts = evaluate.Prompts(scripts["scenes"].Composer(work))
    expectations = list(prompts.combined())
    assert [one.prompt for one in expectations] == [one.prompt for one in evaluate.Prompts(prompts.composer).combined()]
    groups = {one.group for one in expectations}
    assert {
        "colours",
        "held-out colours",
        "riding",
        "held-out riding",
        "two objects",
        "counts",
        "backgrounds",
    } <= groups
    assert expectations[-1].prompt == "an astronaut riding a horse"
    assert not {one.prompt for one in expectations if one.group == "riding"} & {expectations[-1].prompt}
    unseen = list(prompts.synonyms())
    assert {one.prompt for one in unseen} == {words.singular(word) for word in words.UNSEEN}
    puppy = next(one for one in unseen if one.prompt == "a puppy")
    assert puppy.things == (frozenset({prompts.numbers["dog"]}),)


@pytest.mark.slow
def test_the_judge_learns_the_sprites(scripts: dict[str, ModuleType], work: Path) -> None:
    judge = scripts["judge"]
    trained = judge.train(work, steps=100, count=400, batch=16)
    seen_styles = judge.accuracy(trained, work, "fluent-emoji", each=30)
    assert seen_styles["objects top-1"] > 50, "17 things: chance is 6 %"
    assert seen_styles["backgrounds"] > 15, "23 backgrounds: chance is 4 %"
    assert set(seen_styles) >= {"objects top-5", "pair: both", "ride: both", "counts", "colours"}


def test_the_judges_report_has_a_line_for_each_style_and_names_the_held_out_one(
    scripts: dict[str, ModuleType], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = scripts["judge"]
    accuracy = judge.accuracy
    monkeypatch.setattr(judge, "accuracy", lambda *arguments: accuracy(*arguments, each=2))
    torch.manual_seed(0)
    lines = judge.report(judge.Judge(len(THINGS)).eval(), work).splitlines()
    assert [line.split(":")[0] for line in lines] == [*STYLES[:3], "twemoji (held out)"]
    assert all(re.search(r": objects top-1 [\d.]+ %, .*colours [\d.]+ %$", line) for line in lines)


def test_frechet_distance_and_diversity_have_their_closed_forms(scripts: dict[str, ModuleType]) -> None:
    evaluate = scripts["evaluate"]
    a = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(a, a + 2) == pytest.approx(20, abs=1e-4), "5 means apart by 2 each"
    scaled = evaluate.frechet(a, (a - a.mean(0)) * 3 + a.mean(0))
    assert scaled == pytest.approx(float(torch.cov(a.T).trace()) * 4, rel=1e-4), "(3 - 1)^2 of the variance"
    same = torch.ones(2, 3, 8)
    assert evaluate.diversity(same) == pytest.approx(0, abs=1e-6)
    across = torch.eye(8)[None, :2]
    assert evaluate.diversity(across) == pytest.approx(1)


def test_images_of_256_pixels_are_judged_like_their_reductions(
    scripts: dict[str, ModuleType], work: Path, large_work: Path
) -> None:
    judge, evaluate, pairs = scripts["judge"], scripts["evaluate"], scripts["pairs"]
    (large, truth), (small, _) = (judge.scenes(folder, [(5, "pair"), (6, "ride")]) for folder in (large_work, work))
    assert large.shape == (2, 256, 256, 3)
    assert truth.things.sum(1).tolist() == pytest.approx([1, 1])
    halved = (pairs.halved(large).permute(0, 2, 3, 1) * 255 + 0.5).byte().numpy()
    for centres in (judge.BESIDE, judge.ABOVE):
        whole, reduced = (judge.windows(images, centres).astype(int) for images in (large, halved))
        assert whole.shape == (4, 64, 64, 3)
        assert np.abs(whole - reduced).mean() < 3
    assert np.abs(judge.downscale(large).astype(int) - judge.downscale(halved)).max() <= 2
    assert small.shape == (2, 128, 128, 3)

    prompts = evaluate.Prompts(scripts["scenes"].Composer(large_work))
    objects = list(prompts.objects(3))
    real = evaluate.real_images(prompts.composer, objects, seed=1)
    assert real.shape == (3, 256, 256, 3)
    assert evaluate.relative_outlines(real, real) == pytest.approx(1)
    assert evaluate.relative_outlines(real[:, ::2, ::2], real) > 1.5, "enlarged ones are softer"
    assert evaluate.round_trip(prompts.composer, "starter", count=2) > 20


def test_groups_count_what_they_ask_for(scripts: dict[str, ModuleType]) -> None:
    evaluate, judge = scripts["evaluate"], scripts["judge"]
    expectations = [
        evaluate.Expectation("objects", "a cat", (frozenset({2}),), 1),
        evaluate.Expectation("two objects", "a cat and a dog", (frozenset({2}), frozenset({1})), 3),
        evaluate.Expectation("counts", "two cats", (frozenset({2}),), count=2),
        evaluate.Expectation("colours", "a red cat", (frozenset({2}),), colour="red"),
        evaluate.Expectation("backgrounds", "a cat in the snow", (frozenset({2}),), place="snow"),
    ]
    order = torch.tensor([[1, 2, 0, 3, 4, 5]] * 5)
    seen = judge.Predictions(
        features=torch.zeros(5, 2),
        things=order,
        count=torch.tensor([1, 1, 2, 1, 1]),
        place=torch.tensor([judge.PLACE_NAMES.index("snow")] * 5),
        colour=torch.tensor([judge.COLOUR_NAMES.index("blue")] * 5),
    )
    order = torch.tensor([[2, 0, 0, 0], [0, 0, 0, 1]])
    parts = {1: judge.Predictions(seen.features, order, seen.count, seen.place, seen.colour)}
    assert evaluate.table(expectations, seen, parts, 1)["two objects"] == 0, "the dog is the fourth guess"
    parts[1].things[1] = torch.tensor([0, 1, 0, 0])
    assert evaluate.table(expectations, seen, parts, 1) == {
        "objects top-1": 0, "objects top-5": 100, "two objects": 100, "counts": 100, "colours": 0, "backgrounds": 100,
    }  # fmt: skip


def test_sprites_keep_things_and_leave_variants_and_letters(scripts: dict[str, ModuleType]) -> None:
    sprites = scripts["sprites"]

    def kept(label: str, group: str, subgroup: str) -> bool:
        return bool(sprites.is_concept(sprites.emoji.Emoji("1F600", group, label, ()), subgroup))

    assert kept("cat", "animals-nature", "animal-mammal")
    assert kept("astronaut", "people-body", "person-role")
    assert kept("person biking", "people-body", "person-sport")
    assert kept("alarm clock", "travel-places", "time")
    assert kept("red circle", "symbols", "geometric")
    assert not kept("man astronaut", "people-body", "person-role")
    assert not kept("woman biking", "people-body", "person-sport")
    assert not kept("one o’clock", "travel-places", "time")
    assert not kept("small blue diamond", "symbols", "geometric")
    assert not kept("Japanese “here” button", "symbols", "alphanum")
    assert not kept("flag: France", "flags", "country-flag")


@pytest.mark.usefixtures("scripts")
def test_every_script_has_a_help_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    programs = [path for path in sorted(SCRIPTS.glob("*.py")) if "def main()" in path.read_text()]
    assert len(programs) > 10
    for path in programs:
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert ended.value.code == 0
        assert f"usage: {path.name}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_in_miniature_makes_a_model_folder_in_two_goes(
    scripts: dict[str, ModuleType], work: Path, tmp_path: Path
) -> None:
    """The steps of a recipe one after the other, ended in between; diffusers loads what comes out."""
    for name in ("sprites.npy", "sprites.json"):
        (tmp_path / name).write_bytes((work / name).read_bytes())
    recipe = REPOSITORY / "recipes" / "starter" / "mini"
    command = [sys.executable, SCRIPTS / "train.py", tmp_path, "--recipe", recipe]
    first = subprocess.run([*command, "--max-minutes", "0.01"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "time is up" in first.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "+" not in again.stderr, "everything is done"
    out = tmp_path / "model"
    scripts["assemble"].assemble(tmp_path / "runs" / "unet-2", out)
    reference = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    image = reference("a cat", height=32, width=32, num_inference_steps=2).images[0]
    assert image.size == (32, 32)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "vae"
    run.mkdir(parents=True)
    (run / "settings.yaml").touch()
    step = {"train": "vae", "data": "crops"}
    assert "--resume" not in scripts["train"].command(step, tmp_path, tmp_path, minutes=None)
    (run / "checkpoint-500").mkdir()
    assert "--resume" in scripts["train"].command(step, tmp_path, tmp_path, minutes=None)


def test_the_last_instant_of_the_time_is_a_limit_that_the_command_accepts(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    for minutes in (1e-9, 0.001, 0.5, 90.0):
        line = scripts["train"].command({"train": "vae", "data": "crops"}, tmp_path, tmp_path, minutes=minutes)
        hours = float(line[line.index("--max-hours") + 1])
        assert hours > 0
        assert hours == pytest.approx(minutes / 60, abs=1e-4)


def test_a_step_begins_with_a_run_or_with_the_embedded_model(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    for model, given in (("unet-1", str(tmp_path / "runs" / "unet-1")), ("starter", "starter")):
        step = {"train": "unet", "run": "unet-2", "data": "scenes-2", "model": model}
        line = scripts["train"].command(step, tmp_path, tmp_path, minutes=None)
        assert line[line.index("--model") + 1] == given


def test_every_recipe_names_settings_that_there_are() -> None:
    plans = sorted((REPOSITORY / "recipes" / "starter").glob("*/plan.toml"))
    assert plans
    for plan in plans:
        steps = tomllib.loads(plan.read_text())["step"]
        runs = [step.get("run", step["train"]) for step in steps if "train" in step]
        assert sorted(path.stem for path in plan.parent.glob("*.toml") if path != plan) == sorted(runs)
        for step in steps:
            if "train" in step:
                kind = {"vae": VaeSettings, "text-encoder": TextSettings, "unet": UnetSettings}[step["train"]]
                settings_from(kind, {}, config=plan.parent / f"{step.get('run', step['train'])}.toml")
            else:
                assert (SCRIPTS / step["script"]).exists()


def test_what_is_packed_is_small_and_unpacks_to_what_train_needs(
    scripts: dict[str, ModuleType], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = scripts["parts"]
    source, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    shutil.copytree(work, source)
    (source / "texts.txt").write_text("a cat\n" * 1000)
    (source / "done").mkdir()
    for name in ("vae", "scenes-crops"):
        (source / "done" / name).touch()
    run = source / "runs" / "vae"
    (run / "vae").mkdir(parents=True)
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "state.bin").write_bytes(b"x" * 10_000)
    (run / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderTiny"]}))
    (run / "vae" / "config.json").write_text("{}")
    save_file({"w": torch.tensor([[0.5, 1 / 3]])}, run / "vae" / "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr(parts, "CHUNK", 20_000)
    out.mkdir()
    parts.pack(source, out)
    sizes = [path.stat().st_size for path in out.iterdir()]
    assert max(sizes) <= 20_000
    assert sum(sizes) < (source / "sprites.npy").stat().st_size / 10
    again.mkdir()
    parts.unpack(out, again)
    assert np.array_equal(np.load(again / "sprites.npy"), np.load(source / "sprites.npy"))
    for name in ("sprites.json", "texts.txt", "runs/vae/model_index.json", "runs/vae/vae/config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    tensors = load_file(again / "runs" / "vae" / "vae" / "diffusion_pytorch_model.safetensors")
    assert tensors["w"].dtype == torch.float16
    assert torch.equal(tensors["w"], torch.tensor([[0.5, 1 / 3]]).half())
    assert [path.name for path in (again / "done").iterdir()] == ["vae"], "shards are made again"
    assert not (again / "runs" / "vae" / "checkpoint-1").exists()
