"""Compose the starter's training images from sprites, each with its caption in several wordings.

    python scripts/starter/scenes.py WORK WORK/scenes --count 100000 --seed 1

writes tar shards of PNG and caption files that `sdcli train-unet` and `sdcli train-vae` read. WORK is the folder that
sprites.py wrote; images have as many pixels per side as its sprites. Scene n of a seed is always the same, so a longer
set begins with a shorter one.

The scenes: an object on white, on a colour, in a landscape; recoloured; two, three and four of a kind; two things side
by side; one riding another; one above another. Every tenth combination is held out (`words.is_held_out`). The words of
`words.UNSEEN` and drawings in the style twemoji never occur.
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
from words import Concept, concepts, is_held_out, plural, singular

SIDE = 128
"""Width and height of the plane in which scenes are planned, and of images unless the sprites are larger."""
SHARD = 2000
"""Scenes per shard."""
DEFAULT_STYLE = "fluent-emoji"
STYLE_WORDS = {"fluent-emoji": "glossy style", "fluent-emoji-flat": "flat style", "noto": "cartoon style"}
"""The styles in the training data; the fourth is held out."""
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
"""Name of a colour -> hue in degrees, and factors for saturation and value."""
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
"""Landscape -> its wordings in captions."""
KINDS = {
    "plain": 46, "colour": 12, "recoloured": 12, "pair": 8, "count": 6, "ride": 8, "place": 7, "above": 2,
}  # fmt: skip
"""Kind of scene -> its share, in percent (the sum is about 100)."""
PAIRED = ("animals", "food", "vehicles", "objects", "people", "plants")
"""Roles of things that occur in pairs."""
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
    """A background: how it is drawn, its words in captions, and its name (see `Scene.place`)."""

    draw: Callable[[random.Random, int], np.ndarray]
    """From a random source and the pixels per unit of the plane; float32 [side, side, 3], 0..255."""
    words: str
    place: str


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene: centre and size in units of the plane, and its new colour."""

    sprite: int
    x: float
    y: float
    side: float
    colour: str | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """The contents of an image, and its captions."""

    captions: tuple[str, ...]
    backdrop: Backdrop
    placed: tuple[Placed, ...]
    labels: tuple[str, ...]
    """The concepts in it, as labels for the judge."""
    attribute: str = ""
    """The colour or number that the captions name."""

    @property
    def place(self) -> str:
        """The backdrop's name: white, a key of BACKGROUNDS or of PLACES."""
        return self.backdrop.place


@dataclass
class Composer:
    """Makes scenes from the sprites in a folder; a scene depends only on its seed and number."""

    work: Path
    styles: Sequence[str] = tuple(STYLE_WORDS)
    shares: Sequence[int] = STYLE_SHARES
    _hues: dict[int, tuple[int, str] | None] = field(default_factory=dict)

    @cached_property
    def sprites(self) -> np.ndarray:
        """uint8 [sprites, side, side, 4], premultiplied RGBA, memory-mapped."""
        return np.load(self.work / "sprites.npy", mmap_mode="r")

    @cached_property
    def scale(self) -> int:
        """Pixels of an image per unit of the plane."""
        return self.sprites.shape[1] // SIDE

    @cached_property
    def concepts(self) -> list[Concept]:
        return concepts(self.work)

    @cached_property
    def _weights(self) -> list[float]:
        rare = {"smileys-emotion": 1.0, "people-body": 1.0}
        return [3.0 if c.popular else rare.get(c.group, 1.5) for c in self.concepts]

    @cached_property
    def roles(self) -> dict[str, list[Concept]]:
        """Role in a scene -> the concepts that can play it."""

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
        """Scene `number` of a seed and its image, uint8 [side, side, 3]; `kinds` weights the kinds."""
        source = random.Random(f"{seed}/{number}")
        kind = source.choices(list(kinds), list(kinds.values()))[0]
        scene = self.plan(kind, source)
        return scene, self.draw(scene, source)

    def plan(self, kind: str, source: random.Random) -> Scene:
        """A random scene of a kind. Draws again while the combination is held out or missing in the drawn style."""
        while True:
            style = source.choices(list(self.styles), self.shares)[0]
            planned: Scene | None = getattr(self, f"_{kind}")(source, style)
            if planned is not None:
                return planned

    def draw(self, scene: Scene, source: random.Random) -> np.ndarray:
        """The image of a scene, uint8 [side, side, 3]."""
        scale = self.scale
        canvas = scene.backdrop.draw(source, scale)
        for placed in scene.placed:
            sprite = self.sprites[placed.sprite]
            if placed.colour is not None:
                sprite = self.recolour(placed.sprite, placed.colour)
            x, y, side = placed.x * scale, placed.y * scale, placed.side * scale
            blend(canvas, sprite[:, ::-1] if placed.mirrored else sprite, x, y, side)
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
        """A random wording for a single thing."""
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
            return singular(f"{source.choice(MOODS)} {name}")
        if chance < 0.2:
            return name
        if chance < 0.34:
            return source.choice(FRAMES).format(singular(name))
        if chance < 0.44 and concept.tags:
            return ", ".join([name, *source.sample(concept.tags, min(len(concept.tags), source.randint(1, 3)))])
        return singular(name)

    def _recoloured(self, source: random.Random, style: str) -> Scene | None:
        concept = source.choices(self.concepts, self._weights)[0]
        sprite = sprite_of(concept, style)
        hue = self.hue(sprite) if sprite is not None and colourable(concept) else None
        colour = source.choice(list(HUES))
        if sprite is None or hue is None or is_held_out(concept.label, colour):
            return None
        names = [" ".join(w for w in name.split() if w not in HUES and w != "brown") for name in concept.names]
        backdrop = _mostly_white(source)
        words = backdrop.words
        captions = [f"{singular(f'{colour} {source.choice(names)}')}{words}", f"{colour} {names[0]}{words}"]
        captions.append(source.choice(FRAMES).format(singular(f"{colour} {names[0]}")) + words)
        placed = Placed(
            sprite, 64 + source.uniform(-3, 3), 64 + source.uniform(-3, 3), SIDE * source.uniform(0.78, 0.92),
            colour if colour != hue[1] else None,
        )  # fmt: skip
        return Scene(_styled(captions, style, source), backdrop, (placed,), (concept.label,), colour)

    def _pair(self, source: random.Random, style: str) -> Scene | None:
        """Two things side by side, popular ones more often."""
        kinds = [self.roles[name] for name in PAIRED]
        mixed = [c for kind in kinds for c in kind]
        kind = source.choice([*kinds, mixed, mixed])
        left, right = source.choices(kind, [4 if c.popular else 1 for c in kind], k=2)
        a, b = sprite_of(left, style), sprite_of(right, style)
        if a is None or b is None or left is right or is_held_out(*sorted((left.label, right.label))):
            return None
        backdrop = self._any_backdrop(source)
        y = source.uniform(60, 70)
        placed = (
            Placed(a, 35 + source.uniform(-2, 2), y, SIDE * source.uniform(0.46, 0.53)),
            Placed(b, 93 + source.uniform(-2, 2), y, SIDE * source.uniform(0.46, 0.53)),
        )
        words = backdrop.words
        first, second = singular(source.choice(left.names)), singular(source.choice(right.names))
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
        if sprite is None or is_held_out(concept.label, str(number)):
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
            f"{source.choice(NUMBERS[number])} {plural(source.choice(concept.names))}{words}",
            f"{NUMBERS[number][0]} {plural(concept.name)}{words}",
            f"{source.choice(FRAMES).format(f'{NUMBERS[number][0]} {plural(concept.name)}')}{words}",
        ]
        return Scene(_styled(captions, style, source), backdrop, placed, (concept.label,) * number, str(number))

    def _ride(self, source: random.Random, style: str) -> Scene | None:
        rider, mount = source.choice(self.roles["riders"]), source.choice(self.roles["mounts"])
        above, below = sprite_of(rider, style), sprite_of(mount, style)
        if above is None or below is None or rider is mount or is_held_out(rider.label, "rides", mount.label):
            return None
        if (rider.label, mount.label) == ("astronaut", "horse"):
            return None  # the prompt that everybody tries first is reserved for evaluation
        backdrop = self._any_backdrop(source)
        words = backdrop.words
        placed = (
            Placed(below, 64 + source.uniform(-2, 2), 84 + source.uniform(-2, 2), SIDE * 0.66),
            Placed(above, 64 + source.uniform(-5, 5), 34 + source.uniform(-3, 3), SIDE * source.uniform(0.48, 0.54)),
        )
        captions = [
            f"{singular(rider.name)} riding {singular(mount.name)}",
            f"{singular(source.choice(rider.names))} riding {source.choice(['on ', ''])}"
            f"{singular(source.choice(mount.names))}",
            f"{singular(source.choice(rider.names))} "
            f"{source.choice(['on top of', 'on', 'sitting on', 'on the back of'])} "
            f"{singular(source.choice(mount.names))}",
        ]
        captions = [caption + words for caption in captions]
        return Scene(_styled(captions, style, source), backdrop, placed, (rider.label, mount.label))

    def _place(self, source: random.Random, style: str) -> Scene | None:
        lists = self.roles
        kind = lists["animals"] * 2 + lists["people"] + lists["vehicles"] + lists["ground"] + lists["plants"]
        concept, place = source.choice(kind), source.choice(list(PLACES))
        sprite = sprite_of(concept, style)
        if sprite is None or is_held_out(concept.label, place):
            return None
        share = source.uniform(0.58, 0.76)
        bottom = 118 if place not in ("underwater", "space") else 64 + share * 64
        placed = (
            Placed(sprite, 64 + source.uniform(-6, 6), bottom - share * 64 + source.uniform(-3, 3), SIDE * share),
        )
        verbs = ["", "", "", "standing", "sitting", "resting", "waiting"]
        captions = [
            f"{singular(source.choice(concept.names))} {source.choice(PLACES[place])}",
            f"{singular(concept.name)} {source.choice(verbs)} {source.choice(PLACES[place])}".replace("  ", " "),
            f"{source.choice(FRAMES).format(singular(concept.name))} {source.choice(PLACES[place])}",
        ]
        backdrop = Backdrop(LANDSCAPES[place], "", place)
        return Scene(_styled(captions, style, source), backdrop, placed, (concept.label,))

    def _above(self, source: random.Random, style: str) -> Scene | None:
        low, high = source.choice(self.roles["ground"]), source.choice(self.roles["sky"])
        a, b = sprite_of(low, style), sprite_of(high, style)
        if a is None or b is None or low is high or is_held_out(low.label, "under", high.label):
            return None
        backdrop = self._any_backdrop(source, 0.5)
        words = backdrop.words
        placed = (
            Placed(a, 64 + source.uniform(-8, 8), 87, SIDE * 0.6),
            Placed(b, source.choice([32, 64, 96]), 28, SIDE * source.uniform(0.34, 0.42)),
        )
        first, second = singular(source.choice(low.names)), singular(source.choice(high.names))
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
        """The dominant hue (0..255) of a sprite and its name; None if it has several or none."""
        if sprite not in self._hues:
            self._hues[sprite] = self._find_hue(sprite)
        return self._hues[sprite]

    def _find_hue(self, sprite: int) -> tuple[int, str] | None:
        pixels = self.sprites[sprite]
        visible = pixels[..., 3] > 128
        hsv = _hsv(pixels)
        coloured = visible & (hsv[..., 1] > 80) & (hsv[..., 2] > 60)
        if visible.sum() <= 1500 * self.scale**2 or coloured.sum() <= 0.45 * visible.sum():
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

    def recolour(self, sprite: int, colour: str) -> np.ndarray:
        """A sprite with its dominant hue replaced by another colour."""
        pixels, hue = self.sprites[sprite], self.hue(sprite)
        assert hue is not None
        hsv = _hsv(pixels)
        offset = (hsv[..., 0] - hue[0] + 128) % 256 - 128
        replaced = (np.abs(offset) < 26) & (hsv[..., 1] > 40)
        degrees, saturation, value = HUES[colour]
        new = np.stack(
            [
                np.where(replaced, (int(degrees * 256 / 360) + offset // 2) % 256, hsv[..., 0]),
                np.where(replaced, np.clip(hsv[..., 1] * saturation, 0, 255), hsv[..., 1]),
                np.where(replaced, np.clip(hsv[..., 2] * value, 0, 255), hsv[..., 2]),
            ],
            axis=-1,
        ).astype(np.uint8)
        alpha = pixels[..., 3:].astype(np.float32)
        rgb = np.asarray(Image.frombytes("HSV", new.shape[:2], new.tobytes()).convert("RGB")).astype(np.float32)
        return np.concatenate([rgb * alpha / 255, alpha], axis=-1).round().astype(np.uint8)


GROUND = frozenset(
    ["evergreen tree", "deciduous tree", "palm tree", "tent", "mountain", "snow-capped mountain", "camping"]
)


def sprite_of(concept: Concept, style: str) -> int | None:
    """The index of a concept's sprite; the flat style replaces a missing glossy one."""
    if style == DEFAULT_STYLE and style not in concept.sprites:
        return concept.sprites.get("fluent-emoji-flat")
    return concept.sprites.get(style)


def colourable(concept: Concept) -> bool:
    """Whether it makes sense in another colour; skin and smileys do not."""
    return concept.group not in ("people-body", "smileys-emotion") or "heart" in concept.label


def _styled(captions: Sequence[str], style: str, source: random.Random) -> tuple[str, ...]:
    """The captions without repetitions; some name the default style, all another one, none the held-out one."""
    if style not in STYLE_WORDS:
        return tuple(dict.fromkeys(captions))
    chance = 0.15 if style == DEFAULT_STYLE else 1.0
    named = [f"{c}, {STYLE_WORDS[style]}" if source.random() < chance else c for c in captions]
    return tuple(dict.fromkeys(named))


def _hsv(pixels: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA as HSV, int32 [side, side, 3], each 0..255."""
    colours = pixels[..., :3].astype(np.float32) * 255 / np.maximum(pixels[..., 3:], 1)
    rgb = np.clip(colours, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(rgb).convert("HSV")).astype(np.int32)


def blend(canvas: np.ndarray, sprite: np.ndarray, x: float, y: float, side: float) -> None:
    """Blend a sprite, premultiplied uint8 [S, S, 4], over a float32 image, centred at x, y; all in pixels."""
    size, whole = max(8, round(side)), canvas.shape[0]
    # Pillow premultiplies RGBA when it resizes, and these are premultiplied already: CMYK is four plain bands.
    image = Image.frombytes("CMYK", sprite.shape[:2], np.ascontiguousarray(sprite).tobytes())
    if size != image.width:
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    layer = np.asarray(image).astype(np.float32)
    left, top = round(x - size / 2), round(y - size / 2)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(whole, left + size), min(whole, top + size)
    if x1 > x0 and y1 > y0:
        part = layer[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1] *= 1 - part[..., 3:] / 255
        canvas[y0:y1, x0:x1] += part[..., :3]


# Backdrops: float32 [side, side, 3], 0..255. Their numbers are units of the plane, which `scale` converts to pixels.


def plain(colour: Sequence[float], scale: int = 1) -> np.ndarray:
    return np.ones((SIDE * scale, SIDE * scale, 3), np.float32) * np.array(colour, np.float32)


def gradient(top: Sequence[float], bottom: Sequence[float], scale: int = 1, rows: int = SIDE) -> np.ndarray:
    share = np.linspace(0, 1, rows * scale, dtype=np.float32)[:, None, None]
    return (
        np.array(top, np.float32) * (1 - share)
        + np.array(bottom, np.float32) * share
        + np.zeros((1, SIDE * scale, 1), np.float32)
    )


def landscape(
    sky: tuple[Colour, Colour], ground: tuple[Colour, Colour], scale: int = 1, horizon: int = 82
) -> np.ndarray:
    return np.concatenate([gradient(*sky, scale, horizon), gradient(*ground, scale, SIDE - horizon)])


def _white(source: random.Random, scale: int) -> np.ndarray:
    return plain((255, 255, 255), scale)


def _coloured(source: random.Random) -> Backdrop:
    name = source.choice(list(BACKGROUNDS))
    colour = np.clip(np.array(BACKGROUNDS[name]) + [source.gauss(0, 6) for _ in range(3)], 0, 255)
    if source.random() < 0.2:
        return Backdrop(
            lambda _, scale: gradient(colour, colour * 0.6 + 100, scale),
            f" on {singular(name)} gradient background",
            name,
        )
    words = source.choice([f" on {singular(name)} background"] * 3 + [f", {name} background"])
    return Backdrop(lambda _, scale: plain(colour, scale), words, name)


def _mostly_white(source: random.Random) -> Backdrop:
    if source.random() < 0.7:
        return Backdrop(_white, source.choice(["", "", "", "", " on a white background"]), "white")
    return _coloured(source)


def _with_stars(canvas: np.ndarray, source: random.Random, scale: int, count: int, rows: int) -> np.ndarray:
    for _ in range(count):
        x, y, size = source.randrange(127), source.randrange(rows - 1), 1 + (source.random() < 0.4)
        canvas[y * scale : (y + size) * scale, x * scale : (x + size) * scale] = 255
    return canvas


def _beach(source: random.Random, scale: int) -> np.ndarray:
    canvas = landscape(((120, 190, 250), (210, 235, 255)), ((245, 220, 160), (230, 200, 130)), scale)
    canvas[70 * scale : 84 * scale] = (60, 140, 210)
    return canvas


def _night(source: random.Random, scale: int) -> np.ndarray:
    canvas = landscape(((10, 15, 50), (40, 50, 100)), ((30, 60, 45), (20, 40, 30)), scale)
    return _with_stars(canvas, source, scale, 30, 75)


def _space(source: random.Random, scale: int) -> np.ndarray:
    return _with_stars(plain((8, 8, 25), scale), source, scale, 60, SIDE)


def _forest(source: random.Random, scale: int) -> np.ndarray:
    canvas = landscape(((150, 200, 190), (205, 230, 205)), ((60, 110, 55), (45, 85, 45)), scale, 88)
    for x in range(-8, SIDE, 16):
        middle, height = (x + source.uniform(0, 8)) * scale, source.uniform(50, 76)
        top = (92 - height) * scale
        for row in range(int(top), 92 * scale):
            half = (row - top) * 14 / height
            canvas[row, max(0, int(middle - half)) : max(0, int(middle + half))] = (35, 95, 55)
    return canvas


def _mountains(source: random.Random, scale: int) -> np.ndarray:
    canvas = landscape(((120, 180, 240), (215, 235, 250)), ((125, 185, 95), (90, 150, 70)), scale, 88)
    for middle in (source.uniform(10, 40), source.uniform(85, 115), source.uniform(50, 75)):
        top = source.uniform(18, 40) * scale
        for row in range(int(top), 88 * scale):
            half = (row - top) * 0.75
            shade = (245, 248, 252) if row < top + 14 * scale else (125, 130, 150)
            canvas[row, max(0, int(middle * scale - half)) : max(0, int(middle * scale + half))] = shade
    return canvas


def _city(source: random.Random, scale: int) -> np.ndarray:
    canvas = landscape(((150, 195, 235), (220, 232, 242)), ((120, 122, 128), (95, 97, 103)), scale, 96)
    for x in range(0, SIDE, 18):
        top, shade = source.randrange(20, 58), source.uniform(0.8, 1.15)
        canvas[top * scale : 96 * scale, x * scale : (x + 16) * scale] = np.array((98, 112, 140)) * shade
        for row in range(top + 4, 94, 8):  # windows
            for column in range(x + 3, min(x + 14, SIDE), 5):
                canvas[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale] = (250, 225, 140)
    return canvas


LANDSCAPES: dict[str, Callable[[random.Random, int], np.ndarray]] = {
    "field": lambda _, scale: landscape(((110, 180, 245), (200, 230, 255)), ((110, 190, 80), (70, 150, 60)), scale),
    "beach": _beach,
    "night": _night,
    "snow": lambda _, scale: landscape(((170, 200, 230), (220, 235, 245)), ((250, 252, 255), (225, 235, 245)), scale),
    "desert": lambda _, scale: landscape(((120, 190, 240), (240, 230, 200)), ((235, 190, 110), (215, 160, 85)), scale),
    "underwater": lambda _, scale: gradient((90, 190, 230), (10, 60, 130), scale),
    "space": _space,
    "sunset": lambda _, scale: landscape(((90, 60, 130), (250, 150, 80)), ((70, 50, 60), (40, 30, 40)), scale),
    "forest": _forest,
    "mountains": _mountains,
    "city": _city,
}


# Writing


class Shard(NamedTuple):
    """A shard to be written: scenes `start` to `start` + `count` of a seed."""

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


def write_shard(shard: Shard) -> Path:
    """Write a tar of scenes: for each, a PNG and a text file with one caption per line."""
    seed, start, count, crop = shard.seed, shard.start, shard.count, shard.crop
    composer = _composer(shard.work)
    partial = shard.path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(start, start + count):
            scene, image = composer.scene(seed, number, shard.kinds)
            if crop is not None:
                image = most_detailed_crop(image, crop, random.Random(f"crop {seed}/{number}"))
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=1)
            key = f"{seed:03d}{number:08d}"
            for suffix, data in (("png", png.getvalue()), ("txt", "\n".join(scene.captions).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    partial.rename(shard.path)
    return shard.path


def most_detailed_crop(image: np.ndarray, side: int, source: random.Random) -> np.ndarray:
    """The crop with the most contrast of three random ones: a VAE learns nothing from a white background."""
    free = image.shape[0] - side
    spots = [(source.randint(0, free), source.randint(0, free)) for _ in range(3)]
    windows = [image[y : y + side, x : x + side] for x, y in spots]
    return max(windows, key=lambda window: float(window.std()))


_composers: dict[Path, Composer] = {}


def _composer(work: Path) -> Composer:
    """The composer of this process."""
    return _composers.setdefault(work, Composer(work))


def missing_shards(
    work: Path, out: Path, *, seed: int, count: int, crop: int | None = None, kinds: Mapping[str, int] = KINDS
) -> list[Shard]:
    """The shards of a set that do not exist yet."""
    every = [Shard(work, out, seed, at, min(SHARD, count - at), crop, kinds) for at in range(0, count, SHARD)]
    return [shard for shard in every if not shard.path.exists()]


def parse_share(text: str) -> tuple[str, int]:
    """Parse `kind=percent`; argparse reports a ValueError."""
    kind, _, percent = text.partition("=")
    if kind not in KINDS:
        raise ValueError(kind)
    return kind, int(percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py wrote")
    parser.add_argument("out", type=Path, help="the folder for the shards; existing ones are kept")
    parser.add_argument("--count", type=int, default=100_000, help="number of scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--crop", type=int, help="crop each image to a square of this many pixels, to train a VAE")
    parser.add_argument(
        "--share", dest="shares", action="append", type=parse_share, default=[], metavar="KIND=PERCENT",
        help=f"share of a kind; can be repeated ({', '.join(f'{kind}={percent}' for kind, percent in KINDS.items())})",
    )  # fmt: skip
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    todo = missing_shards(
        chosen.work, chosen.out, seed=chosen.seed, count=chosen.count, crop=chosen.crop,
        kinds=KINDS | dict(chosen.shares),
    )  # fmt: skip
    with Pool() as pool:
        for done, path in enumerate(pool.imap_unordered(write_shard, todo), 1):
            print(f"{done} of {len(todo)}: {path}", flush=True)


if __name__ == "__main__":
    main()
