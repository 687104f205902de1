"""What people call the things that the starter generates: names, other words about them, articles and plurals."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from make_emoji_dataset import COLOUR_WORDS, with_article

LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
UNSEEN: dict[str, list[str]] = LISTS["unseen"]
"""Word that no caption has -> the labels of what an image of it may show."""
NEVER = re.compile(rf"\b({'|'.join(map(re.escape, UNSEEN))})(s|es)?\b", re.IGNORECASE)
ALREADY_SEVERAL = re.compile(
    r"([^s]s|fries|teeth|people|mail|money|bread|fire|rice|bacon|cheese|popcorn|snow|fog|wind|"
    r"water|coral|butter|salt|ice|corn|coffee|tea)$"
)
ENDS_IN_S = re.compile(
    r"(bus|cactus|octopus|walrus|abacus|compass|glass|hibiscus|lotus|circus|cross|princess|dress|lens|tennis|chess|ss)$"
)
IRREGULAR = {
    "mouse": "mice", "wolf": "wolves", "person": "people", "man": "men", "woman": "women", "child": "children",
    "foot": "feet", "tooth": "teeth", "goose": "geese", "leaf": "leaves", "fish": "fish", "sheep": "sheep",
    "deer": "deer", "ox": "oxen", "loaf": "loaves",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """A thing with its drawings."""

    label: str
    """Unicode's name of the emoji."""
    group: str
    subgroup: str
    names: tuple[str, ...]
    """What captions call it, the most usual first; none is a word of `UNSEEN`."""
    tags: tuple[str, ...]
    sprites: dict[str, int] = field(hash=False)
    """Style -> place in sprites.npy."""

    @property
    def name(self) -> str:
        """The most usual name."""
        return self.names[0]

    @property
    def popular(self) -> bool:
        """Whether it has everyday names of its own."""
        return self.label in LISTS["names"]


def concepts(work: Path) -> list[Concept]:
    """What sprites.py drew into `work`, in Unicode's order. Concepts without a permitted name are left out."""
    found: dict[str, Concept] = {}
    for place, line in enumerate((work / "sprites.json").read_text(encoding="utf-8").splitlines()):
        facts = json.loads(line)
        label = facts["label"]
        if label not in found:
            names = names_of(label, facts["group"])
            tags = tuple(tag for tag in facts["tags"] if len(tag) > 2 and tag.isalpha() and not NEVER.search(tag))
            found[label] = Concept(label, facts["group"], facts["subgroup"], names, tags, {})
        found[label].sprites[facts["style"]] = place
    return [concept for concept in found.values() if concept.names]


def names_of(label: str, group: str) -> tuple[str, ...]:
    """The everyday names of an emoji, then its own."""
    own = label.lower().replace(":", "")
    names = [*LISTS["names"].get(label, ())]
    if group == "animals-nature" and own.endswith(" face"):
        names += [own, f"{own[:-5]} head", f"face of {with_article(own[:-5])}"]
    elif own.startswith("person "):
        names += [own, f"man {own[7:]}", f"woman {own[7:]}"]
    else:
        names.append(own)
        first, _, rest = own.partition(" ")
        if first in COLOUR_WORDS and rest and group in ("food-drink", "objects", "travel-places"):
            names.append(rest)
    return tuple(dict.fromkeys(name for name in names if not NEVER.search(name)))


def one(name: str) -> str:
    """With an article where it takes one: "an apple", "jeans"."""
    if re.match(r"(the|a|an|my|two|three) ", name) or name in ("santa", "santa claus", "mrs. claus"):
        return name
    return with_article(name)


def several(name: str) -> str:
    """The plural: "dogs", "cups of coffee"."""
    head = re.split(r" (?:with|of|in|on|and|at|over|behind) ", name)[0]
    rest = name.removeprefix(head)
    before, _, last = head.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif ENDS_IN_S.search(last) or re.search(r"(x|ch|sh)$", last):
        last += "es"
    elif ALREADY_SEVERAL.search(last):
        pass
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return f"{before} {last}{rest}".strip()


def held_out(*parts: str) -> bool:
    """Whether a combination is kept out of training: every tenth, by its words alone."""
    return hashlib.sha256("|".join(parts).encode()).digest()[0] < 26
