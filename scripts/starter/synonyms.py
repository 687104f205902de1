"""Say what the starter knows in other words, for `sdcli train-text-encoder --objective align`.

    python scripts/starter/synonyms.py WORK

reads WORK/meanings.npz (meanings.py) and writes WORK/synonyms.jsonl: lists of captions, the first in words that the
starter has learned, the others the same with a word of WordNet in the place of a name, where that name is the
nearest of all in meaning; words of two parts only where they are usual. Names and captions of scenes without another
word are there, too, so that they stay what they are. No word is favoured for being asked for in evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from meanings import lemmas
from scenes import BACKGROUNDS, HUES, KINDS, Composer
from torch import Tensor
from wordnet import Nouns, counts, fetched
from words import one, several

LIKENESS = 0.5
"""Cosine of the meanings from which a word stands for a name. Below it the nearest name is seldom the right one."""
USUAL = 3
"""How often a word that WordNet counts weighs against one that it does not."""

Synonyms = dict[str, tuple[str, ...]]
"""Name -> words of WordNet that are nearer to it than to any other name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what sprites.py and meanings.py wrote")
    parser.add_argument("--wordnet", type=Path, help="the folder with data.noun")
    parser.add_argument("--captions", type=int, default=40_000, help="of scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=12, help="(%(default)s)")
    chosen = parser.parse_args()
    nouns = Nouns(chosen.wordnet or fetched(chosen.work / "packages"))
    composer = Composer(chosen.work)
    with np.load(chosen.work / "meanings.npz") as file:
        texts, vectors = file["texts"].tolist(), torch.from_numpy(file["vectors"].astype(np.float32))
    source = random.Random(chosen.seed)
    usual = counts(nouns.folder)
    candidates = [word for word in lemmas(nouns) if " " not in word or usual.get(word)]
    found = synonyms(composer, candidates, dict(zip(texts, range(len(texts)), strict=True)), vectors)
    lines = [*known(composer), *words(found, usual), *captions(composer, found, usual, source, chosen.captions)]
    source.shuffle(lines)
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (chosen.work / "synonyms.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} lists of captions; {sum(map(len, found.values()))} words for {len(found)} names")


def synonyms(composer: Composer, candidates: Sequence[str], rows: Mapping[str, int], vectors: Tensor) -> Synonyms:
    """The words whose nearest name is near enough; `vectors` are meanings' of the texts that `rows` counts."""
    names = list(dict.fromkeys(name for concept in composer.concepts for name in concept.names))
    table = vectors[[rows[one(name)] for name in names]]
    said = {*names, *BACKGROUNDS, *HUES}
    new = [word for word in candidates if word not in said and one(word) in rows]
    found: dict[str, list[str]] = {}
    for word in new:
        likeness, nearest = (table @ vectors[rows[one(word)]]).max(0)
        name = names[int(nearest)]
        if likeness >= LIKENESS and (name not in word or word.endswith(name)):  # an apple tree is no apple
            found.setdefault(name, []).append(word)
    return {name: tuple(words) for name, words in found.items()}


def known(composer: Composer) -> Iterator[list[str]]:
    """Names and tags, each in several forms."""
    said = [name for concept in composer.concepts for name in (*concept.names, *concept.tags)]
    for name in dict.fromkeys(said):
        yield from ([form(name)] for form in (str, one, several))


def words(found: Synonyms, usual: Mapping[str, int]) -> Iterator[list[str]]:
    """The words alone, in several forms, those for a name together; the usual ones in several lists."""
    for name, others in found.items():
        for turn in range(USUAL):
            forms: dict[str, list[str]] = {}
            for word in others:
                if turn == 0 or usual.get(word):
                    forms.setdefault(name, []).append(word)
                    forms.setdefault(_with_article_of(word, name), []).append(one(word))
                    forms.setdefault(several(name), []).append(several(word))
            yield from ([first, *rest] for first, rest in forms.items())


def captions(
    composer: Composer, found: Synonyms, usual: Mapping[str, int], source: random.Random, count: int
) -> Iterator[list[str]]:
    """One wording each of so many scenes, and the same with another word for one of its things."""
    names = {concept.label: sorted(concept.names, key=len, reverse=True) for concept in composer.concepts}
    for kind in source.choices(list(KINDS), list(KINDS.values()), k=count):
        scene = composer.plan(kind, source)
        caption, label = source.choice(scene.captions), source.choice(scene.labels)
        said = _named(caption, names[label])
        others = found.get(said[2], ()) if said is not None else ()
        if said is None or not others:
            yield [caption]
            continue
        word = source.choices(others, [USUAL if usual.get(one_word) else 1 for one_word in others])[0]
        first, other = (_with_article_of(word, said[2]), one(word)) if said[1] else (said[2], word)
        yield [caption[: said.start()] + text + caption[said.end() :] for text in (first, other)]


def _named(caption: str, names: Sequence[str]) -> re.Match[str] | None:
    """Where a caption says the first of these names that it has; group 1 is its article, if any, group 2 the name."""
    found = (re.search(rf"\b(an? )?({re.escape(name)})\b", caption) for name in names)
    return next((match for match in found if match is not None), None)


def _with_article_of(word: str, name: str) -> str:
    """A name with the article that another word takes, so that only the word makes the difference."""
    return one(word).removesuffix(word) + name


if __name__ == "__main__":
    main()
