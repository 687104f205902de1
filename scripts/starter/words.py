"""The vocabulary of the starter's things: names, tags, articles and plurals."""

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
"""Word that no caption contains -> the labels of the emoji that count for it."""
UNSEEN_WORD = re.compile(rf"\b({'|'.join(map(re.escape, UNSEEN))})(s|es)?\b", re.IGNORECASE)
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
    """A thing with its names and drawings."""

    label: str
    """Unicode's name of the emoji."""
    group: str
    subgroup: str
    names: tuple[str, ...]
    """Its names in captions, the most common first; none contains a word of `UNSEEN`."""
    tags: tuple[str, ...]
    sprites: dict[str, int] = field(hash=False)
    """Style -> index in sprites.npy."""

    @property
    def name(self) -> str:
        """The most common name."""
        return self.names[0]

    @property
    def popular(self) -> bool:
        """Whether words.toml lists everyday names for it."""
        return self.label in LISTS["names"]


def concepts(work: Path) -> list[Concept]:
    """The concepts that sprites.py wrote to `work`, in Unicode's order, except those without a permitted name."""
    found: dict[str, Concept] = {}
    for place, line in enumerate((work / "sprites.json").read_text(encoding="utf-8").splitlines()):
        facts = json.loads(line)
        label = facts["label"]
        if label not in found:
            names = names_of(label, facts["group"])
            tags = tuple(tag for tag in facts["tags"] if len(tag) > 2 and tag.isalpha() and not UNSEEN_WORD.search(tag))
            found[label] = Concept(label, facts["group"], facts["subgroup"], names, tags, {})
        found[label].sprites[facts["style"]] = place
    return [concept for concept in found.values() if concept.names]


def names_of(label: str, group: str) -> tuple[str, ...]:
    """The everyday names of an emoji, then its Unicode name."""
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
    return tuple(dict.fromkeys(name for name in names if not UNSEEN_WORD.search(name)))


def singular(name: str) -> str:
    """A name with its article, if it takes one: "an apple", "jeans"."""
    if re.match(r"(the|a|an|my|two|three) ", name) or name in ("santa", "santa claus", "mrs. claus"):
        return name
    return with_article(name)


def plural(name: str) -> str:
    """The plural of a name: "dogs", "cups of coffee"."""
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


def is_held_out(*parts: str) -> bool:
    """Whether a combination is excluded from training: every tenth, by a hash of its words."""
    return hashlib.sha256("|".join(parts).encode()).digest()[0] < 26
