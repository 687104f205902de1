"""WordNet's nouns: meanings, synonyms and hypernyms, from Debian's package wordnet-base (format: wndb(5WN))."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

THINGS = {"05": 6, "06": 6, "08": 2, "13": 5, "15": 1, "17": 3, "18": 4, "20": 3, "27": 1}
"""WordNet's noun files for visible things (animal, artifact, body, food, location, object, person, plant, substance) ->
their weights in random captions."""


class Synset(NamedTuple):
    """A meaning: its words, the most frequent first, its definition, and its hypernyms."""

    file: str
    lemmas: tuple[str, ...]
    gloss: str
    offset: str
    hypernyms: tuple[str, ...]
    """Their offsets."""


def fetch(packages: Path) -> Path:
    """WordNet's folder, unpacked from Debian's package, which `apt-get download` saves in `packages` once."""
    folder = packages / "wordnet" / "usr" / "share" / "wordnet"
    if not folder.exists():
        packages.mkdir(parents=True, exist_ok=True)
        if not list(packages.glob("wordnet-base_*.deb")):
            subprocess.run(["apt-get", "download", "wordnet-base"], cwd=packages, check=True)
        (package,) = packages.glob("wordnet-base_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(packages / "wordnet")], check=True)
    return folder


def synsets(path: Path) -> Iterator[Synset]:
    """Read the meanings in one of WordNet's data files."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):  # the licence at the top is indented
            fields, _, gloss = line.partition(" | ")
            parts = fields.split(" ")
            words = int(parts[3], 16)
            lemmas = tuple(_readable(parts[4 + 2 * place]) for place in range(words))
            pointers = parts[5 + 2 * words :]
            wider = tuple(pointers[place + 1] for place, kind in enumerate(pointers) if kind in ("@", "@i"))
            yield Synset(parts[1], lemmas, gloss.split(";")[0].strip().lower(), parts[0], wider)


def counts(folder: Path) -> dict[str, int]:
    """Noun -> its frequency in the texts that WordNet's authors annotated."""
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
    """The nouns in WordNet's folder, found by word."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def synsets(self) -> dict[str, Synset]:
        """Offset -> meaning."""
        return {synset.offset: synset for synset in synsets(self.folder / "data.noun")}

    @cached_property
    def _index(self) -> dict[str, list[str]]:
        """Word -> the offsets of its meanings, the most frequent first."""
        found = {}
        for line in (self.folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                found[_readable(parts[0])] = parts[-int(parts[2]) :]
        return found

    def thing(self, word: str) -> Synset | None:
        """The most frequent meaning of a word, or of a plural, that is a visible thing; None if there is none."""
        for known in (word, word.removesuffix("s")):
            if known in self._index:
                meanings = (self.synsets[offset] for offset in self._index[known])
                return next((one for one in meanings if one.file in THINGS), None)
        return None

    def with_synonyms(self, word: str) -> str:
        """A word, its synonyms and its hypernym: "telly, television, receiver"; the word alone if unknown."""
        synset = self.thing(word)
        if synset is None:
            return word
        wider = [self.synsets[offset].lemmas[0] for offset in synset.hypernyms[:1]]
        others = [lemma for lemma in synset.lemmas if lemma != word][:3]
        return ", ".join(dict.fromkeys([word, *others, *wider]))
