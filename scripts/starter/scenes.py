"""Compose the starter's training images from sprites, each with its caption in several wordings.

    python scripts/starter/scenes.py WORK WORK/scenes --count 100000 --seed 1

writes tar shards of PNG and caption files that `sdcli train-unet` and `sdcli train-vae` read. WORK is what sprites.py
wrote. Scene n of a seed is always the same, so a longer set begins with a shorter one.

What is composed: an object on white, on a colour, in a landscape; recoloured; two, three and four of a kind; two
things side by side; one riding another; one above another. Every tenth combination is held out (`words.held_out`), and
the words of `words.UNSEEN` and drawings of the style twemoji never occur.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from words import Concept, concepts, held_out, one, several

SIDE = 128
"""Pixels a side."""
SHARD = 2000
"""Scenes in a shard."""
DEFAULT_STYLE = "fluent-emoji"
STYLE_WORDS = {"fluent-emoji": "glossy style", "fluent-emoji-flat": "flat style", "noto": "cartoon style"}
"""The styles that are trained; the fourth is held out."""
STYLE_SHARES = (70, 17, 13)

Colour = tuple[float, float, float]
BACKGROUNDS: dict[str, Colour] = {
    "red": (220, 50, 50), "orange": (245, 150, 50), "yellow": (250, 220, 80), "green": (80, 180, 90),
    "blue": (70, 120, 220), "light blue": (160, 210, 245), "purple": (140, 80, 190), "pink": (250, 170, 200),
    "black": (15, 15, 20), "gray": (150, 150, 155), "brown": (130, 90, 60),
}  # fmt: skip
HUES = {
    "red": (0, 1.0, 1.0), "orange": (28, 1.0, 1.05), "yellow": (50, 1.0, 1.15), "green": (120, 0.9, 0.9),
    "blue": (218, 1.0, 1.0), "purple": (278, 0.9, 0.95), "pink": (332, 0.65, 1.15),
}  # fmt: skip
"""Name of a colour -> hue in degrees, and what saturation and value are multiplied by."""
PLACES = {
    "field": ("in a green field", "on the grass", "in a meadow", "outdoors on a sunny day", "in the park"),
    "beach": ("on the beach", "at the beach", "by the sea", "on a sandy beach"),
    "night": ("at night", "under a night sky", "at night under the stars", "in the dark night"),
    "snow": ("in the snow", "on snow", "in winter", "in a snowy field"),
    "desert": ("in the desert", "on sand in the desert", "in a hot desert"),
    "underwater": ("under water", "underwater", "in the ocean", "in the deep sea"),
    "space": ("in space", "in outer space", "among the stars"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "forest": ("in the forest", "in the woods", "among the trees"),
    "mountains": ("in the mountains", "in front of mountains", "on a mountain meadow"),
    "city": ("in the city", "in a big city", "in front of skyscrapers"),
}
"""Landscape -> how captions say it."""
KINDS = {
    "plain": 46, "colour": 12, "recoloured": 12, "pair": 8, "count": 6, "ride": 8, "place": 7, "above": 2,
}  # fmt: skip
"""What is composed, with its share in percent (nearly)."""
PAIRED = ("animals", "food", "vehicles", "objects", "people", "plants")
"""Roles of things that stand beside each other."""
NUMBERS = {2: ("two", "two", "a pair of", "2"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
MOODS = ("cute", "little", "beautiful", "big", "nice", "funny", "small", "happy")
FRAMES = (
    "a picture of {}", "clip art of {}", "an illustration of {}", "a drawing of {}", "an icon of {}", "a cartoon of {}",
    "an image of {}", "a painting of {}", "a photo of {}",
)  # fmt: skip

MOUNTS = re.compile(
    r"horse|elephant|camel|cow|^ox$|bear|tiger|lion|pig|zebra|dragon|turtle|whale|dolphin|unicorn|giraffe|goat|^ram$|"
    r"deer|^dog$|^cat$|duck|llama|kangaroo|rhino|hippo|t-rex|sauropod|crocodile|snail|fish|swan|bison|moose|donkey|ewe|"
    r"rabbit|bicycle|scooter|motorcycle|skate|rocket|tractor|boat|canoe|locomotive|truck|automobile|saucer|racing car",
    re.IGNORECASE,
)
RIDERS = re.compile(r"robot|^alien$|ghost|teddy bear|snowman|astronaut|skeleton")
IN_THE_SKY = re.compile(
    r"(full moon|crescent moon|sun|sun with face|star|cloud|rainbow|glowing star|cloud with lightning|cloud with rain|"
    r"airplane|rocket|balloon|bird|butterfly|flying saucer|parachute|helicopter)$"
)
PARTS = re.compile(r"paw|feather|wing|nose|shell|coral|web|nest|print|microbe|face|bouquet|wood|rock")
NO_VEHICLES = re.compile(r"stop|sign|light|fuel|road|track|seat|pump|barrier|buoy|departure|arrival|anchor|wheel$")


class Backdrop(NamedTuple):
    """What is behind the things: how it is drawn, what captions say of it, and its name (see `Scene.place`)."""

    draw: Callable[[random.Random], np.ndarray]
    words: str
    place: str


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene: centre and side in pixels, and its new colour."""

    sprite: int
    x: float
    y: float
    side: float
    colour: str | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """What is to be drawn, and what may be said about it."""

    captions: tuple[str, ...]
    backdrop: Backdrop
    placed: tuple[Placed, ...]
    labels: tuple[str, ...]
    """The concepts in it, for those who judge."""
    said: str = ""
    """The colour or number that the captions name."""

    @property
    def place(self) -> str:
        """The backdrop's name: white, a key of BACKGROUNDS or of PLACES."""
        return self.backdrop.place


@dataclass
class Composer:
    """Makes scenes from the sprites of a folder; a pure function of seed and number."""

    work: Path
    styles: Sequence[str] = tuple(STYLE_WORDS)
    shares: Sequence[int] = STYLE_SHARES
    _hues: dict[int, tuple[int, str] | None] = field(default_factory=dict)

    @cached_property
    def sprites(self) -> np.ndarray:
        """uint8 [sprites, 128, 128, 4], premultiplied RGBA, read as it is asked for."""
        return np.load(self.work / "sprites.npy", mmap_mode="r")

    @cached_property
    def concepts(self) -> list[Concept]:
        return concepts(self.work)

    @cached_property
    def _weights(self) -> list[float]:
        rare = {"smileys-emotion": 1.0, "people-body": 1.0}
        return [3.0 if c.popular else rare.get(c.group, 1.5) for c in self.concepts]

    @cached_property
    def roles(self) -> dict[str, list[Concept]]:
        """The concepts by the part that they can play."""

        def of(*beginnings: str) -> list[Concept]:
            return [c for c in self.concepts if c.subgroup and c.subgroup.startswith(beginnings)]

        animals = [c for c in of("animal-") if not PARTS.search(c.label)]
        people = of("person")
        people = [c for c in people if c.subgroup in ("person", "person-role", "person-fantasy")]
        vehicles = [
            c for c in of("transport-ground", "transport-water", "transport-air") if not NO_VEHICLES.search(c.label)
        ]
        food = [c for c in self.concepts if c.group == "food-drink"]
        objects = [c for c in self.concepts if c.group in ("objects", "activities")]
        sky = [c for c in self.concepts if IN_THE_SKY.match(c.label)]
        ground = of("place-building") + [c for c in self.concepts if c.label in GROUND]
        return {
            "animals": animals, "people": people, "vehicles": vehicles, "food": food, "objects": objects, "sky": sky,
            "ground": ground + animals + vehicles,
            "mounts": [c for c in animals + vehicles if MOUNTS.search(c.label)],
            "riders": people * 2 + animals + [c for c in self.concepts if RIDERS.search(c.label)] * 4,
            "plants": of("plant-"),
        }  # fmt: skip

    def scene(self, seed: int, number: int, kinds: Mapping[str, int] = KINDS) -> tuple[Scene, np.ndarray]:
        """Scene `number` of a seed, by the shares of its kinds, with its image, uint8 [128, 128, 3]."""
        source = random.Random(f"{seed}/{number}")
        kind = source.choices(list(kinds), list(kinds.values()))[0]
        scene = self.plan(kind, source)
        return scene, self.draw(scene, source)

    def plan(self, kind: str, source: random.Random) -> Scene:
        """A scene of a kind; tries again where the drawn combination is held out or not there in the drawn style."""
        while True:
            style = source.choices(list(self.styles), self.shares)[0]
            planned: Scene | None = getattr(self, f"_{kind}")(source, style)
            if planned is not None:
                return planned

    def draw(self, scene: Scene, source: random.Random) -> np.ndarray:
        """The image of a scene, uint8 [128, 128, 3]."""
        canvas = scene.backdrop.draw(source)
        for placed in scene.placed:
            sprite = self.sprites[placed.sprite]
            if placed.colour is not None:
                sprite = self.recoloured(placed.sprite, placed.colour)
            lay(canvas, sprite[:, ::-1] if placed.mirrored else sprite, placed.x, placed.y, placed.side)
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)

    # The kinds

    def _plain(self, source: random.Random, style: str) -> Scene | None:
        words = source.choice(["", "", "", "", "", " on a white background"])
        return self._single(source, style, Backdrop(_white, words, "white"))

    def _colour(self, source: random.Random, style: str) -> Scene | None:
        return self._single(source, style, _coloured(source))

    def _single(self, source: random.Random, style: str, backdrop: Backdrop) -> Scene | None:
        concept = source.choices(self.concepts, self._weights)[0]
        sprite = sprite_of(concept, style)
        if sprite is None:
            return None
        names = [self._described(source, concept, sprite) + backdrop.words for _ in range(3)]
        white = backdrop.place == "white"
        side = source.uniform(0.82, 0.94) if white or source.random() < 0.6 else source.uniform(0.5, 0.85)
        x, y = 64 + source.uniform(-3, 3), 64 + source.uniform(-3, 3)
        placed = (Placed(sprite, x, y, SIDE * side),)
        return Scene(_styled(names, style, source), backdrop, placed, (concept.label,))

    def _described(self, source: random.Random, concept: Concept, sprite: int) -> str:
        """One wording for a single thing."""
        name = source.choice(concept.names[:1] * 2 + concept.names)
        hue = self.hue(sprite)
        if (
            hue is not None
            and source.random() < 0.15
            and colourable(concept)
            and not any(c in name.split() for c in HUES)
        ):
            name = f"{hue[1]} {name}"
        chance = source.random()
        if chance < 0.08:
            return one(f"{source.choice(MOODS)} {name}")
        if chance < 0.2:
            return name
        if chance < 0.34:
            return source.choice(FRAMES).format(one(name))
        if chance < 0.44 and concept.tags:
            return ", ".join([name, *source.sample(concept.tags, min(len(concept.tags), source.randint(1, 3)))])
        return one(name)

    def _recoloured(self, source: random.Random, style: str) -> Scene | None:
        concept = source.choices(self.concepts, self._weights)[0]
        sprite = sprite_of(concept, style)
        hue = self.hue(sprite) if sprite is not None and colourable(concept) else None
        colour = source.choice(list(HUES))
        if sprite is None or hue is None or held_out(concept.label, colour):
            return None
        names = [" ".join(w for w in name.split() if w not in HUES and w != "brown") for name in concept.names]
        backdrop = _mostly_white(source)
        words = backdrop.words
        captions = [f"{one(f'{colour} {source.choice(names)}')}{words}", f"{colour} {names[0]}{words}"]
        captions.append(source.choice(FRAMES).format(one(f"{colour} {names[0]}")) + words)
        placed = Placed(
            sprite, 64 + source.uniform(-3, 3), 64 + source.uniform(-3, 3), SIDE * source.uniform(0.78, 0.92),
            colour if colour != hue[1] else None,
        )  # fmt: skip
        return Scene(_styled(captions, style, source), backdrop, (placed,), (concept.label,), colour)

    def _pair(self, source: random.Random, style: str) -> Scene | None:
        """Two things side by side; usual ones more often."""
        kinds = [self.roles[name] for name in PAIRED]
        mixed = [c for kind in kinds for c in kind]
        kind = source.choice([*kinds, mixed, mixed])
        left, right = source.choices(kind, [4 if c.popular else 1 for c in kind], k=2)
        a, b = sprite_of(left, style), sprite_of(right, style)
        if a is None or b is None or left is right or held_out(*sorted((left.label, right.label))):
            return None
        backdrop = self._any_backdrop(source)
        y = source.uniform(60, 70)
        placed = (
            Placed(a, 35 + source.uniform(-2, 2), y, SIDE * source.uniform(0.46, 0.53)),
            Placed(b, 93 + source.uniform(-2, 2), y, SIDE * source.uniform(0.46, 0.53)),
        )
        words = backdrop.words
        first, second = one(source.choice(left.names)), one(source.choice(right.names))
        captions = [
            f"{first} {source.choice(['and', 'and', 'with'])} {second}",
            f"{first} {source.choice(['next to', 'beside', 'and', 'to the left of', 'left of'])} {second}",
            f"{second} {source.choice(['next to', 'and', 'to the right of', 'right of'])} {first}",
        ]
        captions = [caption + words for caption in captions]
        return Scene(_styled(captions, style, source), backdrop, placed, (left.label, right.label))

    def _count(self, source: random.Random, style: str) -> Scene | None:
        lists = self.roles
        popular = [c for c in self.concepts if c.label in ("star", "red heart", "balloon", "red apple", "cat", "dog")]
        kind = lists["animals"] + lists["food"] + lists["vehicles"] + lists["objects"] + lists["plants"] + popular * 10
        concept, number = source.choice(kind), source.choice([2, 2, 3, 3, 4])
        sprite = sprite_of(concept, style)
        if sprite is None or held_out(concept.label, str(number)):
            return None
        backdrop = _mostly_white(source)
        words = backdrop.words
        spots = {
            2: [(35, 64, 0.5), (93, 64, 0.5)],
            3: [(64, 35, 0.46), (34, 92, 0.46), (94, 92, 0.46)],
            4: [(35, 35, 0.46), (93, 35, 0.46), (35, 93, 0.46), (93, 93, 0.46)],
        }[number]
        placed = tuple(
            Placed(sprite, x + source.uniform(-2, 2), y + source.uniform(-2, 2), SIDE * side) for x, y, side in spots
        )
        captions = [
            f"{source.choice(NUMBERS[number])} {several(source.choice(concept.names))}{words}",
            f"{NUMBERS[number][0]} {several(concept.name)}{words}",
            f"{source.choice(FRAMES).format(f'{NUMBERS[number][0]} {several(concept.name)}')}{words}",
        ]
        return Scene(_styled(captions, style, source), backdrop, placed, (concept.label,) * number, str(number))

    def _ride(self, source: random.Random, style: str) -> Scene | None:
        rider, mount = source.choice(self.roles["riders"]), source.choice(self.roles["mounts"])
        above, below = sprite_of(rider, style), sprite_of(mount, style)
        if above is None or below is None or rider is mount or held_out(rider.label, "rides", mount.label):
            return None
        if (rider.label, mount.label) == ("astronaut", "horse"):
            return None  # what everybody tries first shall be a test
        backdrop = self._any_backdrop(source)
        words = backdrop.words
        placed = (
            Placed(below, 64 + source.uniform(-2, 2), 84 + source.uniform(-2, 2), SIDE * 0.66),
            Placed(above, 64 + source.uniform(-5, 5), 34 + source.uniform(-3, 3), SIDE * source.uniform(0.48, 0.54)),
        )
        captions = [
            f"{one(rider.name)} riding {one(mount.name)}",
            f"{one(source.choice(rider.names))} riding {source.choice(['on ', ''])}{one(source.choice(mount.names))}",
            f"{one(source.choice(rider.names))} {source.choice(['on top of', 'on', 'sitting on', 'on the back of'])} "
            f"{one(source.choice(mount.names))}",
        ]
        captions = [caption + words for caption in captions]
        return Scene(_styled(captions, style, source), backdrop, placed, (rider.label, mount.label))

    def _place(self, source: random.Random, style: str) -> Scene | None:
        lists = self.roles
        kind = lists["animals"] * 2 + lists["people"] + lists["vehicles"] + lists["ground"] + lists["plants"]
        concept, place = source.choice(kind), source.choice(list(PLACES))
        sprite = sprite_of(concept, style)
        if sprite is None or held_out(concept.label, place):
            return None
        share = source.uniform(0.58, 0.76)
        bottom = 118 if place not in ("underwater", "space") else 64 + share * 64
        placed = (
            Placed(sprite, 64 + source.uniform(-6, 6), bottom - share * 64 + source.uniform(-3, 3), SIDE * share),
        )
        verbs = ["", "", "", "standing", "sitting", "resting", "waiting"]
        captions = [
            f"{one(source.choice(concept.names))} {source.choice(PLACES[place])}",
            f"{one(concept.name)} {source.choice(verbs)} {source.choice(PLACES[place])}".replace("  ", " "),
            f"{source.choice(FRAMES).format(one(concept.name))} {source.choice(PLACES[place])}",
        ]
        backdrop = Backdrop(LANDSCAPES[place], "", place)
        return Scene(_styled(captions, style, source), backdrop, placed, (concept.label,))

    def _above(self, source: random.Random, style: str) -> Scene | None:
        low, high = source.choice(self.roles["ground"]), source.choice(self.roles["sky"])
        a, b = sprite_of(low, style), sprite_of(high, style)
        if a is None or b is None or low is high or held_out(low.label, "under", high.label):
            return None
        backdrop = self._any_backdrop(source, 0.5)
        words = backdrop.words
        placed = (
            Placed(a, 64 + source.uniform(-8, 8), 87, SIDE * 0.6),
            Placed(b, source.choice([32, 64, 96]), 28, SIDE * source.uniform(0.34, 0.42)),
        )
        first, second = one(source.choice(low.names)), one(source.choice(high.names))
        second = re.sub(r"^a (?=moon$|sun$)", "the ", second)
        captions = [
            f"{first} under {second}",
            f"{second} above {first}",
            f"{second} over {first}",
            f"{first} below {second}",
        ]
        captions = [caption + words for caption in source.sample(captions, 3)]
        return Scene(_styled(captions, style, source), backdrop, placed, (low.label, high.label))

    def _any_backdrop(self, source: random.Random, landscapes: float = 0.3) -> Backdrop:
        if source.random() < landscapes:
            place = source.choice(list(PLACES))
            return Backdrop(LANDSCAPES[place], f" {source.choice(PLACES[place])}", place)
        return _mostly_white(source)

    # Colours

    def hue(self, sprite: int) -> tuple[int, str] | None:
        """The hue (0..255) that nearly all of a sprite has, and its name; None where it has several or none."""
        if sprite not in self._hues:
            self._hues[sprite] = self._find_hue(sprite)
        return self._hues[sprite]

    def _find_hue(self, sprite: int) -> tuple[int, str] | None:
        pixels = self.sprites[sprite]
        visible = pixels[..., 3] > 128
        hsv = _hsv(pixels)
        coloured = visible & (hsv[..., 1] > 80) & (hsv[..., 2] > 60)
        if visible.sum() <= 1500 or coloured.sum() <= 0.45 * visible.sum():
            return None
        counts = np.bincount(hsv[..., 0][coloured], minlength=256).astype(float)
        near = np.convolve(np.r_[counts[-12:], counts, counts[:12]], np.ones(25), "valid")
        if near.max() <= 0.72 * coloured.sum():
            return None
        hue = int(near.argmax())
        name = min(
            (n for n in HUES if n != "pink"), key=lambda n: abs((HUES[n][0] - hue * 360 / 256 + 180) % 360 - 180)
        )
        return hue, "brown" if name == "orange" and hsv[..., 2][coloured].mean() < 190 else name

    def recoloured(self, sprite: int, colour: str) -> np.ndarray:
        """A sprite whose main hue is turned into another colour."""
        pixels, hue = self.sprites[sprite], self.hue(sprite)
        assert hue is not None
        hsv = _hsv(pixels)
        apart = (hsv[..., 0] - hue[0] + 128) % 256 - 128
        turned = (np.abs(apart) < 26) & (hsv[..., 1] > 40)
        degrees, saturation, value = HUES[colour]
        new = np.stack(
            [
                np.where(turned, (int(degrees * 256 / 360) + apart // 2) % 256, hsv[..., 0]),
                np.where(turned, np.clip(hsv[..., 1] * saturation, 0, 255), hsv[..., 1]),
                np.where(turned, np.clip(hsv[..., 2] * value, 0, 255), hsv[..., 2]),
            ],
            axis=-1,
        ).astype(np.uint8)
        alpha = pixels[..., 3:].astype(np.float32)
        rgb = np.asarray(Image.frombytes("HSV", (SIDE, SIDE), new.tobytes()).convert("RGB")).astype(np.float32)
        return np.concatenate([rgb * alpha / 255, alpha], axis=-1).round().astype(np.uint8)


GROUND = frozenset(
    ["evergreen tree", "deciduous tree", "palm tree", "tent", "mountain", "snow-capped mountain", "camping"]
)


def sprite_of(concept: Concept, style: str) -> int | None:
    """The place of a concept's drawing; a concept without a glossy one has a flat one instead."""
    if style == DEFAULT_STYLE and style not in concept.sprites:
        return concept.sprites.get("fluent-emoji-flat")
    return concept.sprites.get(style)


def colourable(concept: Concept) -> bool:
    """Whether people would ask for it in another colour; skin and smileys are left alone."""
    return concept.group not in ("people-body", "smileys-emotion") or "heart" in concept.label


def _styled(captions: Sequence[str], style: str, source: random.Random) -> tuple[str, ...]:
    """The captions, none twice. The default style is named now and then, the others always, the held-out one never."""
    if style not in STYLE_WORDS:
        return tuple(dict.fromkeys(captions))
    chance = 0.15 if style == DEFAULT_STYLE else 1.0
    named = [f"{c}, {STYLE_WORDS[style]}" if source.random() < chance else c for c in captions]
    return tuple(dict.fromkeys(named))


def _hsv(pixels: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA as int32 [128, 128, 3], each 0..255."""
    colours = pixels[..., :3].astype(np.float32) * 255 / np.maximum(pixels[..., 3:], 1)
    rgb = np.clip(colours, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(rgb).convert("HSV")).astype(np.int32)


def lay(canvas: np.ndarray, sprite: np.ndarray, x: float, y: float, side: float) -> None:
    """Blend a sprite, premultiplied uint8 [128, 128, 4], over a float32 canvas, its centre at x, y."""
    size = max(8, round(side))
    # Pillow multiplies RGBA by its alpha while it resizes, and these are multiplied already: CMYK is four plain bands.
    image = Image.frombytes("CMYK", (SIDE, SIDE), np.ascontiguousarray(sprite).tobytes())
    if size != SIDE:
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    layer = np.asarray(image).astype(np.float32)
    left, top = round(x - size / 2), round(y - size / 2)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(SIDE, left + size), min(SIDE, top + size)
    if x1 > x0 and y1 > y0:
        part = layer[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1] *= 1 - part[..., 3:] / 255
        canvas[y0:y1, x0:x1] += part[..., :3]


# Backdrops: float32 [128, 128, 3], 0..255


def plain(colour: Sequence[float]) -> np.ndarray:
    return np.ones((SIDE, SIDE, 3), np.float32) * np.array(colour, np.float32)


def gradient(top: Sequence[float], bottom: Sequence[float], rows: int = SIDE) -> np.ndarray:
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return (
        np.array(top, np.float32) * (1 - share)
        + np.array(bottom, np.float32) * share
        + np.zeros((1, SIDE, 1), np.float32)
    )


def landscape(sky: tuple[Colour, Colour], ground: tuple[Colour, Colour], horizon: int = 82) -> np.ndarray:
    return np.concatenate([gradient(*sky, horizon), gradient(*ground, SIDE - horizon)])


def _white(source: random.Random) -> np.ndarray:
    return plain((255, 255, 255))


def _coloured(source: random.Random) -> Backdrop:
    name = source.choice(list(BACKGROUNDS))
    colour = np.clip(np.array(BACKGROUNDS[name]) + [source.gauss(0, 6) for _ in range(3)], 0, 255)
    if source.random() < 0.2:
        return Backdrop(lambda _: gradient(colour, colour * 0.6 + 100), f" on {one(name)} gradient background", name)
    words = source.choice([f" on {one(name)} background"] * 3 + [f", {name} background"])
    return Backdrop(lambda _: plain(colour), words, name)


def _mostly_white(source: random.Random) -> Backdrop:
    if source.random() < 0.7:
        return Backdrop(_white, source.choice(["", "", "", "", " on a white background"]), "white")
    return _coloured(source)


def _with_stars(canvas: np.ndarray, source: random.Random, count: int, rows: int) -> np.ndarray:
    for _ in range(count):
        x, y, size = source.randrange(127), source.randrange(rows - 1), 1 + (source.random() < 0.4)
        canvas[y : y + size, x : x + size] = 255
    return canvas


def _beach(source: random.Random) -> np.ndarray:
    canvas = landscape(((120, 190, 250), (210, 235, 255)), ((245, 220, 160), (230, 200, 130)))
    canvas[70:84] = (60, 140, 210)
    return canvas


def _night(source: random.Random) -> np.ndarray:
    return _with_stars(landscape(((10, 15, 50), (40, 50, 100)), ((30, 60, 45), (20, 40, 30))), source, 30, 75)


def _space(source: random.Random) -> np.ndarray:
    return _with_stars(plain((8, 8, 25)), source, 60, SIDE)


def _forest(source: random.Random) -> np.ndarray:
    canvas = landscape(((150, 200, 190), (205, 230, 205)), ((60, 110, 55), (45, 85, 45)), 88)
    for x in range(-8, SIDE, 16):
        middle, height = x + source.uniform(0, 8), source.uniform(50, 76)
        for row in range(int(92 - height), 92):
            half = (row - (92 - height)) * 14 / height
            canvas[row, max(0, int(middle - half)) : max(0, int(middle + half))] = (35, 95, 55)
    return canvas


def _mountains(source: random.Random) -> np.ndarray:
    canvas = landscape(((120, 180, 240), (215, 235, 250)), ((125, 185, 95), (90, 150, 70)), 88)
    for middle in (source.uniform(10, 40), source.uniform(85, 115), source.uniform(50, 75)):
        top = source.uniform(18, 40)
        for row in range(int(top), 88):
            half = (row - top) * 0.75
            shade = (245, 248, 252) if row < top + 14 else (125, 130, 150)
            canvas[row, max(0, int(middle - half)) : max(0, int(middle + half))] = shade
    return canvas


def _city(source: random.Random) -> np.ndarray:
    canvas = landscape(((150, 195, 235), (220, 232, 242)), ((120, 122, 128), (95, 97, 103)), 96)
    for x in range(0, SIDE, 18):
        top, shade = source.randrange(20, 58), source.uniform(0.8, 1.15)
        canvas[top:96, x : x + 16] = np.array((98, 112, 140)) * shade
        canvas[top + 4 : 94 : 8, x + 3 : x + 14 : 5] = (250, 225, 140)
    return canvas


LANDSCAPES: dict[str, Callable[[random.Random], np.ndarray]] = {
    "field": lambda _: landscape(((110, 180, 245), (200, 230, 255)), ((110, 190, 80), (70, 150, 60))),
    "beach": _beach,
    "night": _night,
    "snow": lambda _: landscape(((170, 200, 230), (220, 235, 245)), ((250, 252, 255), (225, 235, 245))),
    "desert": lambda _: landscape(((120, 190, 240), (240, 230, 200)), ((235, 190, 110), (215, 160, 85))),
    "underwater": lambda _: gradient((90, 190, 230), (10, 60, 130)),
    "space": _space,
    "sunset": lambda _: landscape(((90, 60, 130), (250, 150, 80)), ((70, 50, 60), (40, 30, 40))),
    "forest": _forest,
    "mountains": _mountains,
    "city": _city,
}


# Writing


class Job(NamedTuple):
    """A shard to write."""

    work: Path
    out: Path
    seed: int
    start: int
    count: int
    crop: int | None
    kinds: Mapping[str, int]

    @property
    def path(self) -> Path:
        return self.out / f"{self.seed:03d}-{self.start // SHARD:05d}.tar"


def shard(job: Job) -> Path:
    """Write one tar of scenes: PNG and captions, a line each."""
    seed, start, count, crop = job.seed, job.start, job.count, job.crop
    composer = _composer(job.work)
    partial = job.path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(start, start + count):
            scene, image = composer.scene(seed, number, job.kinds)
            if crop is not None:
                image = liveliest(image, crop, random.Random(f"crop {seed}/{number}"))
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            key = f"{seed:03d}{number:08d}"
            for suffix, data in (("png", png.getvalue()), ("txt", "\n".join(scene.captions).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    partial.rename(job.path)
    return job.path


def liveliest(image: np.ndarray, side: int, source: random.Random) -> np.ndarray:
    """The square window with the most contrast of three drawn ones: a VAE learns nothing from white paper."""
    free = SIDE - side
    spots = [(source.randint(0, free), source.randint(0, free)) for _ in range(3)]
    windows = [image[y : y + side, x : x + side] for x, y in spots]
    return max(windows, key=lambda window: float(window.std()))


_composers: dict[Path, Composer] = {}


def _composer(work: Path) -> Composer:
    """One a process."""
    return _composers.setdefault(work, Composer(work))


def jobs(
    work: Path, out: Path, *, seed: int, count: int, crop: int | None = None, kinds: Mapping[str, int] = KINDS
) -> list[Job]:
    """The shards that are not there yet."""
    every = [Job(work, out, seed, at, min(SHARD, count - at), crop, kinds) for at in range(0, count, SHARD)]
    return [job for job in every if not job.path.exists()]


def share(text: str) -> tuple[str, int]:
    """`kind=percent`. Raises ValueError, which argparse tells."""
    kind, _, percent = text.partition("=")
    if kind not in KINDS:
        raise ValueError(kind)
    return kind, int(percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what sprites.py wrote")
    parser.add_argument("out", type=Path, help="the folder for the shards; those that are there are kept")
    parser.add_argument("--count", type=int, default=100_000, help="scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--crop", type=int, help="only a square of so many pixels of each: what a VAE is trained on")
    parser.add_argument(
        "--share", dest="shares", action="append", type=share, default=[], metavar="KIND=PERCENT",
        help=f"how many scenes are of a kind ({', '.join(f'{kind}={percent}' for kind, percent in KINDS.items())})",
    )  # fmt: skip
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    todo = jobs(
        chosen.work, chosen.out, seed=chosen.seed, count=chosen.count, crop=chosen.crop,
        kinds=KINDS | dict(chosen.shares),
    )  # fmt: skip
    with Pool() as pool:
        for done, path in enumerate(pool.imap_unordered(shard, todo), 1):
            print(f"{done} of {len(todo)}: {path}", flush=True)


if __name__ == "__main__":
    main()
