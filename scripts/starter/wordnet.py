"""WordNet's nouns: their meanings, synonyms and hypernyms, out of Debian's package wordnet-base (format: wndb(5WN))."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

THINGS = {"05": 6, "06": 6, "08": 2, "13": 5, "15": 1, "17": 3, "18": 4, "20": 3, "27": 1}
"""WordNet's files of nouns that can be generated (animal, artifact, body, food, location, object, person, plant,
substance), and how often captions are made of them."""


class Synset(NamedTuple):
    """A meaning: its words, the most usual first, what they mean, and the meanings that are wider."""

    file: str
    lemmas: tuple[str, ...]
    gloss: str
    offset: str
    hypernyms: tuple[str, ...]
    """By their offsets."""


def fetched(packages: Path) -> Path:
    """WordNet's folder out of Debian's package, which `apt-get download` fetches into `packages` unless it is there."""
    folder = packages / "wordnet" / "usr" / "share" / "wordnet"
    if not folder.exists():
        packages.mkdir(parents=True, exist_ok=True)
        if not list(packages.glob("wordnet-base_*.deb")):
            subprocess.run(["apt-get", "download", "wordnet-base"], cwd=packages, check=True)
        (package,) = packages.glob("wordnet-base_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(packages / "wordnet")], check=True)
    return folder


def synsets(path: Path) -> Iterator[Synset]:
    """The meanings in one of WordNet's data files."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):  # the licence stands at the top
            fields, _, gloss = line.partition(" | ")
            parts = fields.split(" ")
            words = int(parts[3], 16)
            lemmas = tuple(_readable(parts[4 + 2 * place]) for place in range(words))
            pointers = parts[5 + 2 * words :]
            wider = tuple(pointers[place + 1] for place, kind in enumerate(pointers) if kind in ("@", "@i"))
            yield Synset(parts[1], lemmas, gloss.split(";")[0].strip().lower(), parts[0], wider)


def counts(folder: Path) -> dict[str, int]:
    """How often each noun stands in the texts that WordNet's makers read."""
    found: dict[str, int] = {}
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        sense, _, count = line.split(" ")
        lemma, _, kind = sense.partition("%")
        if kind.startswith("1"):
            word = lemma.replace("_", " ")
            found[word] = found.get(word, 0) + int(count)
    return found


def _readable(lemma: str) -> str:
    return re.sub(r"\(.*\)", "", lemma).replace("_", " ").lower()


class Nouns:
    """The nouns of WordNet's folder by their words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def synsets(self) -> dict[str, Synset]:
        """By offset."""
        return {synset.offset: synset for synset in synsets(self.folder / "data.noun")}

    @cached_property
    def _index(self) -> dict[str, list[str]]:
        """Word -> the offsets of its meanings, the most usual first."""
        found = {}
        for line in (self.folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                found[_readable(parts[0])] = parts[-int(parts[2]) :]
        return found

    def thing(self, word: str) -> Synset | None:
        """What a word, or its plural, means when it is generated: its most usual meaning that is a thing."""
        for known in (word, word.removesuffix("s")):
            if known in self._index:
                meanings = (self.synsets[offset] for offset in self._index[known])
                return next((one for one in meanings if one.file in THINGS), None)
        return None

    def said_fully(self, word: str) -> str:
        """A word with its synonyms and the next wider word: "telly, television, receiver"; or alone."""
        synset = self.thing(word)
        if synset is None:
            return word
        wider = [self.synsets[offset].lemmas[0] for offset in synset.hypernyms[:1]]
        others = [lemma for lemma in synset.lemmas if lemma != word][:3]
        return ", ".join(dict.fromkeys([word, *others, *wider]))
