"""Evaluate a starter model: generate groups of prompts and let the judge check what the images show.

    python scripts/starter/evaluate.py WORK MODEL --out WORK/evaluation

MODEL is any value of `sdcli generate --model`. The judge is trained first unless WORK/judge.pt exists; its accuracy on
real scenes is printed before anything else. Then `sdcli generate` runs every prompt with seeds 0 to 3 at the model's
default steps and guidance. OUT (use one per model) receives the images; table.md and figures.json: the percentage of
images in each group that match their prompts, the VAE's PSNR, the width of outlines relative to that in real images
(sharpness.py), the Frechet distance to real sprites in the judge's features (and between two sets of real ones), and
the diversity of a prompt's images; and a grid for each group: its first prompts with seed 0, not selected. With a WORK
of `sprites.py --side 256`, real images have 256 pixels per side, too, whatever the size of the model's.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import judge as judging
import numpy as np
import torch
from judge import ABOVE, BESIDE, COLOUR_NAMES, HELD_OUT_STYLE, PAIR_TOP_K, PLACE_NAMES, Predictions
from PIL import Image
from scenes import HUES, NUMBERS, PLACES, SIDE, Composer, blend, colourable, plain, sprite_of
from sharpness import outline_width
from torch import Tensor
from torch.nn import functional as F
from words import LISTS, UNSEEN, Concept, is_held_out, plural, singular

from sdcli.images.contact_sheet import contact_sheet
from sdcli.images.metrics import psnr
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.vae.autoencoder import cell, decode, moments, scaling_factor

SEEDS = 4
CLASSIC = "an astronaut riding a horse"
GRID = 48
"""Maximum number of prompts in a grid."""


@dataclass(frozen=True)
class Expectation:
    """A prompt and what its images must show."""

    group: str
    prompt: str
    things: tuple[frozenset[int], ...]
    """For each thing, the numbers of the concepts that count for it."""
    top_k: int = 5
    """Each thing must be among the judge's first k predictions."""
    count: int | None = None
    colour: str | None = None
    place: str | None = None

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """The centres of the judge's windows for two things; none if it classifies the whole image."""
        kind = self.group.removeprefix("held-out ")
        return {"two objects": BESIDE, "riding": ABOVE}.get(kind, ())

    def is_met(self, seen: Predictions, row: int) -> bool:
        """Whether an image matches, by the predictions for its windows if it has some, else for the whole image."""
        if self.windows:
            return seen.has_both(row, [set(thing) for thing in self.things], self.top_k)
        if self.count is not None:
            return int(seen.count[row]) == self.count
        if self.colour is not None:
            return COLOUR_NAMES[int(seen.colour[row])] == self.colour
        if self.place is not None:
            return PLACE_NAMES[int(seen.place[row])] == self.place
        return all(seen.has(row, set(thing), self.top_k) for thing in self.things)


class Prompts:
    """The prompts of all groups; the same sprites give the same prompts."""

    def __init__(self, composer: Composer, *, seed: int = 11) -> None:
        self.composer = composer
        self.source = random.Random(seed)
        self.concepts = composer.concepts
        self.numbers = {concept.label: number for number, concept in enumerate(self.concepts)}
        self._named: dict[str, set[int]] = {}
        for number, concept in enumerate(self.concepts):
            for name in concept.names:
                self._named.setdefault(name, set()).add(number)

    def all(self) -> list[Expectation]:
        return [*self.objects(120), *self.synonyms(), *self.combined(), *self.sentences()]

    def every_object(self) -> list[Expectation]:
        """Every concept once, by its most common name."""
        return [Expectation("every object", singular(c.name), (self._thing(c),), 1) for c in self.concepts]

    def objects(self, count: int) -> Iterator[Expectation]:
        for concept in self.source.sample(self.concepts, count):
            yield Expectation("objects", singular(concept.name), (self._thing(concept),), 1)

    def synonyms(self) -> Iterator[Expectation]:
        for word, labels in UNSEEN.items():
            thing = frozenset(self.numbers[label] for label in labels if label in self.numbers)
            yield Expectation("unseen synonyms", singular(word), (thing,))

    def combined(self) -> Iterator[Expectation]:
        """Combinations from training, held-out ones, and the prompt that everybody tries first."""
        yield from self._combinations("", 32, new=False)
        yield from self._combinations("held-out ", 16, new=True)
        both = (self._thing(self._of("astronaut")), self._thing(self._of("horse")))
        yield Expectation("held-out riding", CLASSIC, both, PAIR_TOP_K)

    def _combinations(self, name: str, each: int, *, new: bool) -> Iterator[Expectation]:
        """Colours, counts, backgrounds, two objects and riding, `each` of them."""
        roles = self.composer.roles
        popular = {role: [c for c in of_role if c.popular] for role, of_role in roles.items()}
        coloured = [c for c in self.concepts if c.popular and self._hue(c) is not None]
        countable = popular["animals"] + popular["food"] + popular["vehicles"]
        things = countable + popular["objects"]
        for c, colour in self._sample_pairs(coloured, list(HUES), each, lambda c, x: is_held_out(c.label, x) == new):
            yield Expectation(
                f"{name}colours", singular(f"{colour} {_without_colour(c)}"), (self._thing(c),), colour=colour
            )
        for c, number in self._sample_pairs(
            countable, [2, 3, 4], each, lambda c, n: is_held_out(c.label, str(n)) == new
        ):
            yield Expectation(
                f"{name}counts", f"{NUMBERS[number][0]} {plural(c.name)}", (self._thing(c),), count=number
            )
        for c, place in self._sample_pairs(
            popular["ground"], list(PLACES), each, lambda c, p: is_held_out(c.label, p) == new
        ):
            yield Expectation(
                f"{name}backgrounds", f"{singular(c.name)} {PLACES[place][0]}", (self._thing(c),), place=place
            )

        def side_by_side(a: Concept, b: Concept) -> bool:
            return _distinct(a, b) and is_held_out(*sorted((a.label, b.label))) == new

        def rides(a: Concept, b: Concept) -> bool:
            return _distinct(a, b) and is_held_out(a.label, "rides", b.label) == new

        for a, b in self._sample_pairs(things, things, each, side_by_side):
            both = (self._thing(a), self._thing(b))
            yield Expectation(f"{name}two objects", f"{singular(a.name)} and {singular(b.name)}", both, PAIR_TOP_K)
        for a, b in self._sample_pairs(popular["riders"], popular["mounts"], each, rides):
            both = (self._thing(a), self._thing(b))
            yield Expectation(f"{name}riding", f"{singular(a.name)} riding {singular(b.name)}", both, PAIR_TOP_K)

    def sentences(self) -> Iterator[Expectation]:
        for sentence, labels in LISTS["sentences"].items():
            yield Expectation("free sentences", sentence, tuple(self._thing(self._of(label)) for label in labels))

    def _thing(self, concept: Concept) -> frozenset[int]:
        """The concepts that share its name: "a moon" may be full or a crescent."""
        return frozenset(self._named[concept.name])

    def _of(self, label: str) -> Concept:
        return self.concepts[self.numbers[label]]

    def _hue(self, concept: Concept) -> tuple[int, str] | None:
        sprite = sprite_of(concept, "fluent-emoji")
        return self.composer.hue(sprite) if sprite is not None and colourable(concept) else None

    def _sample_pairs(
        self, first: Sequence[Any], second: Sequence[Any], count: int, fits: Callable[[Any, Any], bool]
    ) -> list[tuple[Any, Any]]:
        """Up to `count` different random pairs that fit."""
        pairs: dict[tuple[Any, Any], None] = {}
        for _ in range(100_000):
            pair = (self.source.choice(first), self.source.choice(second))
            if len(pairs) == count:
                break
            if fits(*pair):
                pairs[pair] = None
        return list(pairs)


def _distinct(a: Concept, b: Concept) -> bool:
    return not set(a.names) & set(b.names)


def _without_colour(concept: Concept) -> str:
    return " ".join(word for word in concept.name.split() if word not in HUES and word != "brown")


# Images


def generate_images(model: str, expectations: Sequence[Expectation], out: Path, *, seeds: int) -> np.ndarray:
    """Run `sdcli generate`; uint8 [prompts, seeds, side, side, 3]. Existing images are kept."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = out / "jobs.jsonl"
    lines = [
        json.dumps({"prompt": expected.prompt, "seed": seed, "custom_id": f"{number:04d}-{seed}"}) + "\n"
        for number, expected in enumerate(expectations)
        for seed in range(seeds)
    ]
    jobs.write_text("".join(lines), encoding="utf-8")
    command = ["generate", "--model", model, "--prompts-file", str(jobs), "--outdir", str(out)]
    command += ["--output", "{custom_id}.png", "--resume", "--quiet"]
    subprocess.run([Path(sys.executable).with_name("sdcli"), *command], check=True, stdout=subprocess.DEVNULL)
    images = [
        [np.asarray(Image.open(out / f"{number:04d}-{seed}.png").convert("RGB")) for seed in range(seeds)]
        for number in range(len(expectations))
    ]
    return np.array(images)


# Figures


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of features [n, D], as Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the trace of the root is the sum of the roots of the product's
    eigenvalues. Not comparable with FIDs of other networks.
    """
    means, covariances = zip(*((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b)), strict=True)
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0)
    trace = covariances[0].trace() + covariances[1].trace() - 2 * eigenvalues.sqrt().sum()
    return float((means[0] - means[1]).square().sum() + trace)


def diversity(features: Tensor) -> float:
    """1 - mean cosine similarity between the images of a prompt, over all prompts; features [prompts, seeds, D]."""
    unit = torch.nn.functional.normalize(features, dim=2)
    seeds = range(features.shape[1])
    return float(torch.stack([1 - (unit[:, a] * unit[:, b]).sum(1) for a, b in combinations(seeds, 2)]).mean())


def real_images(composer: Composer, expectations: Sequence[Expectation], *, seed: int) -> np.ndarray:
    """Real sprites of the expected things, in the default style on white: uint8 [n, side, side, 3]."""
    source, images, scale = random.Random(seed), [], composer.scale
    for expected in expectations:
        concept = composer.concepts[min(expected.things[0])]
        sprite = sprite_of(concept, "fluent-emoji")
        canvas = plain((255, 255, 255), scale)
        if sprite is not None:
            x, y = (64 + source.uniform(-3, 3)) * scale, (64 + source.uniform(-3, 3)) * scale
            blend(canvas, composer.sprites[sprite], x, y, SIDE * scale * source.uniform(0.82, 0.94))
        images.append(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return np.stack(images)


def round_trip(composer: Composer, model: str, *, count: int = 200) -> float:
    """The mean PSNR in dB of the VAE's reconstructions of sprites in the held-out style, on white, of 16x16 latents."""
    vae = load_model(load_registry().find(model), device="cpu", dtype="float32", parts=("vae",)).parts["vae"]
    scale = 16 * cell(vae) // SIDE
    drawn = [concept.sprites[HELD_OUT_STYLE] for concept in composer.concepts if HELD_OUT_STYLE in concept.sprites]
    found = []
    for place in random.Random(2).sample(drawn, min(count, len(drawn))):
        canvas = plain((255, 255, 255), scale)
        blend(canvas, composer.sprites[place], 64 * scale, 64 * scale, SIDE * scale * 0.9)
        image = judging.as_tensor((canvas + 0.5).astype(np.uint8)[None])
        mean, _ = moments(vae, image)
        found.append(psnr(decode(vae, mean * scaling_factor(vae)), image))
    return float(torch.cat(found).mean())


def relative_outlines(images: np.ndarray, real: np.ndarray) -> float:
    """The mean 10-90 % width of the outlines of images relative to that of real ones, each uint8 [n, side, side, 3].

    Smaller images are enlarged to the size of the larger ones, as a person would do to compare them.
    """
    side = max(images.shape[1], real.shape[1])
    widths = [
        outline_width(F.interpolate(judging.as_tensor(one), side, mode="bicubic").clamp(0, 1)) for one in (images, real)
    ]
    return widths[0] / widths[1]


def table(
    expectations: Sequence[Expectation], seen: Predictions, seen_in_windows: Mapping[int, Predictions], seeds: int
) -> dict[str, float]:
    """Percentage of matching images by group; objects also among the first five predictions.

    `seen_in_windows`: number of a prompt with two things -> the predictions for the windows of its images.
    """
    found: dict[str, list[bool]] = {}
    for number, expected in enumerate(expectations):
        for row in range(number * seeds, (number + 1) * seeds):
            if expected.windows:
                both = expected.is_met(seen_in_windows[number], row - number * seeds)
                found.setdefault(expected.group, []).append(both)
            elif expected.group in ("objects", "every object"):
                for name, top_k in (("top-1", 1), ("top-5", 5)):
                    right = seen.has(row, set(expected.things[0]), top_k)
                    found.setdefault(f"{expected.group} {name}", []).append(right)
            else:
                found.setdefault(expected.group, []).append(expected.is_met(seen, row))
    return {name: 100 * sum(rights) / len(rights) for name, rights in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py wrote")
    parser.add_argument("model", help="a model, as for `sdcli generate --model`")
    parser.add_argument("--out", type=Path, required=True, help="the folder for images and figures")
    parser.add_argument("--every-object", action="store_true", help="generate every concept once, and nothing else")
    chosen = parser.parse_args()
    judge = judging.load_judge(chosen.work)
    print(f"The judge on real scenes:\n{judging.report(judge, chosen.work)}", flush=True)
    composer = Composer(chosen.work)
    prompts = Prompts(composer)
    expectations = prompts.every_object() if chosen.every_object else prompts.all()
    seeds = 1 if chosen.every_object else SEEDS
    images = generate_images(chosen.model, expectations, chosen.out / "images", seeds=seeds)
    seen = judging.predict(judge, judging.downscale(images.reshape(-1, *images.shape[2:])))
    parts = {
        number: judging.predict(judge, judging.windows(images[number], expected.windows))
        for number, expected in enumerate(expectations)
        if expected.windows
    }
    figures = table(expectations, seen, parts, seeds)
    figures["VAE round trip of held-out sprites, dB"] = round_trip(composer, chosen.model)
    objects = [number for number, expected in enumerate(expectations) if expected.group in ("objects", "every object")]
    figures["width of outlines, of real images' 1"] = relative_outlines(
        images[objects, 0], real_images(composer, [expectations[number] for number in objects], seed=0)
    )
    features = seen.features.reshape(len(expectations), seeds, -1)[objects]
    real = [real_images(composer, [expectations[number] for number in objects], seed=seed) for seed in range(2 * seeds)]
    real_features = [judging.predict(judge, judging.downscale(one_set)).features for one_set in real]
    figures["distance to real images"] = frechet(features.flatten(0, 1), torch.cat(real_features[:seeds]))
    figures["distance of real ones among themselves"] = frechet(
        torch.cat(real_features[seeds:]), torch.cat(real_features[:seeds])
    )
    if seeds > 1:
        figures["diversity over seeds"] = diversity(features)
        figures["diversity of real ones"] = diversity(torch.stack(real_features[:seeds], dim=1))
    lines = [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    text = "\n".join(["| measure | figure |", "|---|---|", *lines, ""])
    (chosen.out / "table.md").write_text(text, encoding="utf-8")
    (chosen.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for group in dict.fromkeys(expected.group for expected in expectations):
        rows = [number for number, expected in enumerate(expectations) if expected.group == group][:GRID]
        shown = [Image.fromarray(images[number, 0]) for number in rows]
        sheet = contact_sheet(shown, columns=8, labels=[expectations[number].prompt for number in rows])
        sheet.save(chosen.out / f"{group.replace(' ', '-')}.png")
    for number, expected in enumerate(expectations):
        if expected.prompt == CLASSIC:
            text += f"{CLASSIC} is prompt {number}"
    print(text)


if __name__ == "__main__":
    main()
