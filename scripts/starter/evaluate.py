"""Measure a starter model: generate prompts in groups and let the judge say whether what was asked for is there.

    python scripts/starter/evaluate.py WORK MODEL --out WORK/evaluation

MODEL is anything that `sdcli generate --model` takes. The judge is trained first unless WORK/judge.pt is there, and its
accuracy on real scenes is printed before anything else. Then `sdcli generate` runs every prompt with seeds 0 to 3 at
the model's own steps and guidance. OUT, which should be another one for another model, gets the images; table.md and
figures.json: percent of the images of a group that show what was asked for, the VAE's PSNR, the Frechet distance to
real sprites in the judge's features beside that of real ones among themselves, and how far the images of a prompt lie
apart; and a grid for each group: its first prompts, seed 0, whatever they look like.
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
from judge import ABOVE, BESIDE, COLOUR_NAMES, HELD_OUT_STYLE, PAIR_AMONG, PLACE_NAMES, Seen
from PIL import Image
from scenes import HUES, NUMBERS, PLACES, SIDE, Composer, colourable, lay, plain, sprite_of
from torch import Tensor
from words import LISTS, UNSEEN, Concept, held_out, one, several

from sdcli.images.contact_sheet import contact_sheet
from sdcli.images.metrics import psnr
from sdcli.models.loader import load_model
from sdcli.models.registry import load_registry
from sdcli.vae.autoencoder import decode, moments, scaling_factor

SEEDS = 4
FIRST_TRIED = "an astronaut riding a horse"
GRID = 48
"""Prompts in a grid."""


@dataclass(frozen=True)
class Requested:
    """A prompt and what must be there."""

    group: str
    prompt: str
    things: tuple[frozenset[int], ...]
    """Each by the numbers of the concepts that count for it."""
    among: int = 5
    """Each must be among so many of the judge's first guesses."""
    count: int | None = None
    colour: str | None = None
    place: str | None = None

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Where the judge looks for two things; nothing where it looks at the whole image."""
        kind = self.group.removeprefix("held-out ")
        return {"two objects": BESIDE, "riding": ABOVE}.get(kind, ())

    def found(self, seen: Seen, row: int) -> bool:
        """Whether an image shows what its group asks for. `seen` is of windows where it has some."""
        if self.windows:
            return seen.find_both(row, [set(thing) for thing in self.things], self.among)
        if self.count is not None:
            return int(seen.count[row]) == self.count
        if self.colour is not None:
            return COLOUR_NAMES[int(seen.colour[row])] == self.colour
        if self.place is not None:
            return PLACE_NAMES[int(seen.place[row])] == self.place
        return all(seen.finds(row, set(thing), self.among) for thing in self.things)


class Prompts:
    """The prompts of all groups, always the same for the same sprites."""

    def __init__(self, composer: Composer, *, seed: int = 11) -> None:
        self.composer = composer
        self.source = random.Random(seed)
        self.concepts = composer.concepts
        self.numbers = {concept.label: number for number, concept in enumerate(self.concepts)}
        self._named: dict[str, set[int]] = {}
        for number, concept in enumerate(self.concepts):
            for name in concept.names:
                self._named.setdefault(name, set()).add(number)

    def all(self) -> list[Requested]:
        return [*self.objects(120), *self.synonyms(), *self.combined(), *self.sentences()]

    def every_object(self) -> list[Requested]:
        """Every concept once, by its usual name."""
        return [Requested("every object", one(c.name), (self._thing(c),), 1) for c in self.concepts]

    def objects(self, count: int) -> Iterator[Requested]:
        for concept in self.source.sample(self.concepts, count):
            yield Requested("objects", one(concept.name), (self._thing(concept),), 1)

    def synonyms(self) -> Iterator[Requested]:
        for word, labels in UNSEEN.items():
            thing = frozenset(self.numbers[label] for label in labels if label in self.numbers)
            yield Requested("unseen synonyms", one(word), (thing,))

    def combined(self) -> Iterator[Requested]:
        """Combinations of the training, then held-out ones, and what everybody tries first."""
        yield from self._combinations("", 32, new=False)
        yield from self._combinations("held-out ", 16, new=True)
        both = (self._thing(self._of("astronaut")), self._thing(self._of("horse")))
        yield Requested("held-out riding", FIRST_TRIED, both, PAIR_AMONG)

    def _combinations(self, name: str, each: int, *, new: bool) -> Iterator[Requested]:
        """Colours, counts, backgrounds, two objects and riding, `each` of them."""
        roles = self.composer.roles
        popular = {role: [c for c in of_role if c.popular] for role, of_role in roles.items()}
        coloured = [c for c in self.concepts if c.popular and self._hue(c) is not None]
        countable = popular["animals"] + popular["food"] + popular["vehicles"]
        things = countable + popular["objects"]
        for c, colour in self._drawn(coloured, list(HUES), each, lambda c, x: held_out(c.label, x) == new):
            yield Requested(f"{name}colours", one(f"{colour} {_without_colour(c)}"), (self._thing(c),), colour=colour)
        for c, number in self._drawn(countable, [2, 3, 4], each, lambda c, n: held_out(c.label, str(n)) == new):
            yield Requested(f"{name}counts", f"{NUMBERS[number][0]} {several(c.name)}", (self._thing(c),), count=number)
        for c, place in self._drawn(popular["ground"], list(PLACES), each, lambda c, p: held_out(c.label, p) == new):
            yield Requested(f"{name}backgrounds", f"{one(c.name)} {PLACES[place][0]}", (self._thing(c),), place=place)

        def beside(a: Concept, b: Concept) -> bool:
            return _apart(a, b) and held_out(*sorted((a.label, b.label))) == new

        def rides(a: Concept, b: Concept) -> bool:
            return _apart(a, b) and held_out(a.label, "rides", b.label) == new

        for a, b in self._drawn(things, things, each, beside):
            both = (self._thing(a), self._thing(b))
            yield Requested(f"{name}two objects", f"{one(a.name)} and {one(b.name)}", both, PAIR_AMONG)
        for a, b in self._drawn(popular["riders"], popular["mounts"], each, rides):
            both = (self._thing(a), self._thing(b))
            yield Requested(f"{name}riding", f"{one(a.name)} riding {one(b.name)}", both, PAIR_AMONG)

    def sentences(self) -> Iterator[Requested]:
        for sentence, labels in LISTS["sentences"].items():
            yield Requested("free sentences", sentence, tuple(self._thing(self._of(label)) for label in labels))

    def _thing(self, concept: Concept) -> frozenset[int]:
        """The concepts that share the usual name: "a moon" may be full or a crescent."""
        return frozenset(self._named[concept.name])

    def _of(self, label: str) -> Concept:
        return self.concepts[self.numbers[label]]

    def _hue(self, concept: Concept) -> tuple[int, str] | None:
        sprite = sprite_of(concept, "fluent-emoji")
        return self.composer.hue(sprite) if sprite is not None and colourable(concept) else None

    def _drawn(
        self, first: Sequence[Any], second: Sequence[Any], count: int, fits: Callable[[Any, Any], bool]
    ) -> list[tuple[Any, Any]]:
        """Different pairs of one of each that fit."""
        chosen: dict[tuple[Any, Any], None] = {}
        for _ in range(100_000):
            pair = (self.source.choice(first), self.source.choice(second))
            if len(chosen) == count:
                break
            if fits(*pair):
                chosen[pair] = None
        return list(chosen)


def _apart(a: Concept, b: Concept) -> bool:
    return not set(a.names) & set(b.names)


def _without_colour(concept: Concept) -> str:
    return " ".join(word for word in concept.name.split() if word not in HUES and word != "brown")


# Painting


def painted(model: str, asked: Sequence[Requested], out: Path, *, seeds: int) -> np.ndarray:
    """Run `sdcli generate`; uint8 [prompts, seeds, 128, 128, 3]. Existing images are not generated again."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = out / "jobs.jsonl"
    lines = [
        json.dumps({"prompt": one_asked.prompt, "seed": seed, "custom_id": f"{number:04d}-{seed}"}) + "\n"
        for number, one_asked in enumerate(asked)
        for seed in range(seeds)
    ]
    jobs.write_text("".join(lines), encoding="utf-8")
    command = ["generate", "--model", model, "--prompts-file", str(jobs), "--outdir", str(out)]
    command += ["--output", "{custom_id}.png", "--resume", "--quiet"]
    subprocess.run([Path(sys.executable).with_name("sdcli"), *command], check=True, stdout=subprocess.DEVNULL)
    whole = [
        [np.asarray(Image.open(out / f"{number:04d}-{seed}.png").convert("RGB")) for seed in range(seeds)]
        for number in range(len(asked))
    ]
    return np.array(whole)


# Figures


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of features [n, D], as Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the trace of the root is the sum of the roots of the product's
    eigenvalues. Not comparable with FIDs of other networks.
    """
    means, covariances = zip(*((one.double().mean(0), torch.cov(one.double().T)) for one in (a, b)), strict=True)
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0)
    trace = covariances[0].trace() + covariances[1].trace() - 2 * eigenvalues.sqrt().sum()
    return float((means[0] - means[1]).square().sum() + trace)


def diversity(features: Tensor) -> float:
    """1 - the mean cosine between the images of one prompt, over prompts; features [prompts, seeds, D]."""
    unit = torch.nn.functional.normalize(features, dim=2)
    seeds = range(features.shape[1])
    return float(torch.stack([1 - (unit[:, a] * unit[:, b]).sum(1) for a, b in combinations(seeds, 2)]).mean())


def real_images(composer: Composer, asked: Sequence[Requested], *, seed: int) -> np.ndarray:
    """Real sprites of what was asked for, in the default style on white: uint8 [n, 128, 128, 3]."""
    source, images = random.Random(seed), []
    for one_asked in asked:
        concept = composer.concepts[min(one_asked.things[0])]
        sprite = sprite_of(concept, "fluent-emoji")
        canvas = plain((255, 255, 255))
        if sprite is not None:
            at = (64 + source.uniform(-3, 3), 64 + source.uniform(-3, 3))
            lay(canvas, composer.sprites[sprite], *at, SIDE * source.uniform(0.82, 0.94))
        images.append(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return np.stack(images)


def round_trip(composer: Composer, model: str, *, count: int = 200) -> float:
    """The mean PSNR in dB of the VAE's reconstructions of sprites in the held-out style, on white at 128x128."""
    vae = load_model(load_registry().find(model), device="cpu", dtype="float32", parts=("vae",)).parts["vae"]
    drawn = [concept.sprites[HELD_OUT_STYLE] for concept in composer.concepts if HELD_OUT_STYLE in concept.sprites]
    found = []
    for place in random.Random(2).sample(drawn, min(count, len(drawn))):
        canvas = plain((255, 255, 255))
        lay(canvas, composer.sprites[place], 64, 64, SIDE * 0.9)
        image = judging.as_tensor((canvas + 0.5).astype(np.uint8)[None])
        mean, _ = moments(vae, image)
        found.append(psnr(decode(vae, mean * scaling_factor(vae)), image))
    return float(torch.cat(found).mean())


def table(asked: Sequence[Requested], seen: Seen, seen_in_windows: Mapping[int, Seen], seeds: int) -> dict[str, float]:
    """Percent found by group; objects also by the first five guesses.

    `seen_in_windows`: number of a prompt that asks for two things -> what the windows of its images show.
    """
    found: dict[str, list[bool]] = {}
    for number, one_asked in enumerate(asked):
        for row in range(number * seeds, (number + 1) * seeds):
            if one_asked.windows:
                both = one_asked.found(seen_in_windows[number], row - number * seeds)
                found.setdefault(one_asked.group, []).append(both)
            elif one_asked.group in ("objects", "every object"):
                for name, among in (("top-1", 1), ("top-5", 5)):
                    right = seen.finds(row, set(one_asked.things[0]), among)
                    found.setdefault(f"{one_asked.group} {name}", []).append(right)
            else:
                found.setdefault(one_asked.group, []).append(one_asked.found(seen, row))
    return {name: 100 * sum(rights) / len(rights) for name, rights in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what sprites.py wrote")
    parser.add_argument("model", help="what `sdcli generate --model` takes")
    parser.add_argument("--out", type=Path, required=True, help="the folder for images and figures")
    parser.add_argument("--every-object", action="store_true", help="paint every concept once, and nothing else")
    chosen = parser.parse_args()
    judge = judging.load_judge(chosen.work)
    print(f"The judge on real scenes:\n{judging.report(judge, chosen.work)}", flush=True)
    composer = Composer(chosen.work)
    prompts = Prompts(composer)
    asked = prompts.every_object() if chosen.every_object else prompts.all()
    seeds = 1 if chosen.every_object else SEEDS
    images = painted(chosen.model, asked, chosen.out / "pictures", seeds=seeds)
    seen = judging.look(judge, judging.shrunk(images.reshape(-1, SIDE, SIDE, 3)))
    parts = {
        number: judging.look(judge, judging.windows(images[number], one_asked.windows))
        for number, one_asked in enumerate(asked)
        if one_asked.windows
    }
    figures = table(asked, seen, parts, seeds)
    figures["VAE round trip of held-out sprites, dB"] = round_trip(composer, chosen.model)
    objects = [number for number, one_asked in enumerate(asked) if one_asked.group in ("objects", "every object")]
    features = seen.features.reshape(len(asked), seeds, -1)[objects]
    real = [real_images(composer, [asked[number] for number in objects], seed=seed) for seed in range(2 * seeds)]
    real_features = [judging.look(judge, judging.shrunk(one_set)).features for one_set in real]
    figures["distance to real images"] = frechet(features.flatten(0, 1), torch.cat(real_features[:seeds]))
    figures["distance of real ones among themselves"] = frechet(
        torch.cat(real_features[seeds:]), torch.cat(real_features[:seeds])
    )
    if seeds > 1:
        figures["diversity over seeds"] = diversity(features)
        figures["diversity of real ones"] = diversity(torch.stack(real_features[:seeds], dim=1))
    lines = [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    text = "\n".join(["| what | figure |", "|---|---|", *lines, ""])
    (chosen.out / "table.md").write_text(text, encoding="utf-8")
    (chosen.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for group in dict.fromkeys(one_asked.group for one_asked in asked):
        rows = [number for number, one_asked in enumerate(asked) if one_asked.group == group][:GRID]
        shown = [Image.fromarray(images[number, 0]) for number in rows]
        sheet = contact_sheet(shown, columns=8, labels=[asked[number].prompt for number in rows])
        sheet.save(chosen.out / f"{group.replace(' ', '-')}.png")
    for number, one_asked in enumerate(asked):
        if one_asked.prompt == FIRST_TRIED:
            text += f"{FIRST_TRIED} is prompt {number}"
    print(text)


if __name__ == "__main__":
    main()
