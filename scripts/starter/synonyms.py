"""Write captions with synonyms for the names that the starter knows, for `train-text-encoder --objective align`.

    python scripts/starter/synonyms.py WORK

reads WORK/meanings.npz (from meanings.py) and writes WORK/synonyms.jsonl: lists of captions. The first caption of a
list uses words that the starter has learned; in the others, a word of WordNet replaces the name that is nearest to it
in meaning (two-word terms only if they are common). Names and captions without a replacement are included, so that
their states are preserved. Words that evaluate.py tests get no special treatment.
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
from wordnet import Nouns, counts, fetch
from words import plural, singular

LIKENESS = 0.5
"""Minimum cosine similarity of a word and a name. Below it the nearest name is seldom the right one."""
COMMON_WEIGHT = 3
"""Weight of a word with a frequency in WordNet, relative to one without."""

Synonyms = dict[str, tuple[str, ...]]
"""Name -> words of WordNet that are nearer to it than to any other name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py and meanings.py wrote")
    parser.add_argument("--wordnet", type=Path, help="WordNet's folder, with data.noun")
    parser.add_argument("--captions", type=int, default=40_000, help="number of scene captions (%(default)s)")
    parser.add_argument("--seed", type=int, default=12, help="random seed (%(default)s)")
    chosen = parser.parse_args()
    nouns = Nouns(chosen.wordnet or fetch(chosen.work / "packages"))
    composer = Composer(chosen.work)
    with np.load(chosen.work / "meanings.npz") as file:
        texts, vectors = file["texts"].tolist(), torch.from_numpy(file["vectors"].astype(np.float32))
    source = random.Random(chosen.seed)
    frequencies = counts(nouns.folder)
    candidates = [word for word in lemmas(nouns) if " " not in word or frequencies.get(word)]
    found = synonyms(composer, candidates, dict(zip(texts, range(len(texts)), strict=True)), vectors)
    lines = [*known_names(composer), *words(found, frequencies)]
    lines += captions(composer, found, frequencies, source, chosen.captions)
    source.shuffle(lines)
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (chosen.work / "synonyms.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} lists of captions; {sum(map(len, found.values()))} words for {len(found)} names")


def synonyms(composer: Composer, candidates: Sequence[str], rows: Mapping[str, int], vectors: Tensor) -> Synonyms:
    """Candidates that are near enough to their nearest name; `rows` maps a text to its row in `vectors`."""
    names = list(dict.fromkeys(name for concept in composer.concepts for name in concept.names))
    table = vectors[[rows[singular(name)] for name in names]]
    known = {*names, *BACKGROUNDS, *HUES}
    new = [word for word in candidates if word not in known and singular(word) in rows]
    found: dict[str, list[str]] = {}
    for word in new:
        likeness, nearest = (table @ vectors[rows[singular(word)]]).max(0)
        name = names[int(nearest)]
        if likeness >= LIKENESS and (name not in word or word.endswith(name)):  # an apple tree is not an apple
            found.setdefault(name, []).append(word)
    return {name: tuple(words) for name, words in found.items()}


def known_names(composer: Composer) -> Iterator[list[str]]:
    """Names and tags, each in several forms."""
    names = [name for concept in composer.concepts for name in (*concept.names, *concept.tags)]
    for name in dict.fromkeys(names):
        yield from ([form(name)] for form in (str, singular, plural))


def words(found: Synonyms, frequencies: Mapping[str, int]) -> Iterator[list[str]]:
    """Lists of a name and its synonyms, one for each form; common words occur in several lists."""
    for name, others in found.items():
        for turn in range(COMMON_WEIGHT):
            forms: dict[str, list[str]] = {}
            for word in others:
                if turn == 0 or frequencies.get(word):
                    forms.setdefault(name, []).append(word)
                    forms.setdefault(_with_article_of(word, name), []).append(singular(word))
                    forms.setdefault(plural(name), []).append(plural(word))
            yield from ([first, *rest] for first, rest in forms.items())


def captions(
    composer: Composer, found: Synonyms, frequencies: Mapping[str, int], source: random.Random, count: int
) -> Iterator[list[str]]:
    """A caption of each of `count` scenes, and the same caption with a synonym for one of its things."""
    names = {concept.label: sorted(concept.names, key=len, reverse=True) for concept in composer.concepts}
    for kind in source.choices(list(KINDS), list(KINDS.values()), k=count):
        scene = composer.plan(kind, source)
        caption, label = source.choice(scene.captions), source.choice(scene.labels)
        match = _find_name(caption, names[label])
        others = found.get(match[2], ()) if match is not None else ()
        if match is None or not others:
            yield [caption]
            continue
        word = source.choices(others, [COMMON_WEIGHT if frequencies.get(one_word) else 1 for one_word in others])[0]
        first, other = (_with_article_of(word, match[2]), singular(word)) if match[1] else (match[2], word)
        yield [caption[: match.start()] + text + caption[match.end() :] for text in (first, other)]


def _find_name(caption: str, names: Sequence[str]) -> re.Match[str] | None:
    """The match of the first of these names in a caption: group 1 is the article or None, group 2 the name."""
    found = (re.search(rf"\b(an? )?({re.escape(name)})\b", caption) for name in names)
    return next((match for match in found if match is not None), None)


def _with_article_of(word: str, name: str) -> str:
    """A name with the article that `word` takes, so that the captions differ only in the word."""
    return singular(word).removesuffix(word) + name


if __name__ == "__main__":
    main()
