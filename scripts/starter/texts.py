"""Gather what the starter's text encoder learns from: captions, and the words of WordNet.

    python scripts/starter/texts.py WORK

writes WORK/texts.txt, a text a line, for `sdcli train-text-encoder WORK/texts.txt --teacher ...`: names, plurals and
tags of the things that are generated (several times, so that they weigh more), captions of scenes, WordNet's nouns,
adjectives and verbs with their glosses, and captions in which nouns of WordNet stand for the things. So words that no
caption has get their meaning from the teacher. The dictionary comes from Debian's package wordnet-base, which
`apt-get download` fetches into WORK/packages unless it is there (or give its folder with --wordnet).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from scenes import BACKGROUNDS, FRAMES, HUES, KINDS, NUMBERS, PLACES, STYLE_WORDS, Composer
from wordnet import THINGS, counts, fetched, synsets
from words import UNSEEN, one, several

NEAR = 8
"""How often names weigh against other texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what sprites.py wrote")
    parser.add_argument("--wordnet", type=Path, help="the folder with data.noun")
    parser.add_argument("--captions", type=int, default=60_000, help="scenes whose captions are taken (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="(%(default)s)")
    chosen = parser.parse_args()
    wordnet = chosen.wordnet or fetched(chosen.work / "packages")
    source = random.Random(chosen.seed)
    composer = Composer(chosen.work)
    texts = [text for text in names(composer) for _ in range(NEAR)]
    texts += scene_captions(composer, source, chosen.captions)
    texts += dictionary(wordnet, source)
    source.shuffle(texts)
    (chosen.work / "texts.txt").write_text("\n".join([*texts, ""]), encoding="utf-8")
    print(f"{len(texts)} texts, {len(set(texts))} different ones")


def names(composer: Composer) -> list[str]:
    """Every name with and without article, in the plural, and with its tags; the words that captions leave out too."""
    texts: dict[str, None] = {}
    for concept in composer.concepts:
        for name in concept.names:
            texts |= dict.fromkeys([name, one(name), several(name)])
        if concept.tags:
            texts[f"{concept.name}, {', '.join(concept.tags)}"] = None
            texts |= dict.fromkeys(concept.tags)
    for word in UNSEEN:
        texts |= dict.fromkeys([word, one(word), several(word)])
    return list(texts)


def scene_captions(composer: Composer, source: random.Random, count: int) -> list[str]:
    """One wording each of so many scenes."""
    kinds = source.choices(list(KINDS), list(KINDS.values()), k=count)
    return [source.choice(composer.plan(kind, source).captions) for kind in kinds]


def dictionary(folder: Path, source: random.Random) -> Iterator[str]:
    """WordNet's words and glosses, and captions with its nouns."""
    usual = counts(folder)
    things: list[tuple[str, int]] = []
    for synset in synsets(folder / "data.noun"):
        weight = THINGS.get(synset.file, 0)
        for lemma in synset.lemmas:
            if len(lemma) < 25 and (weight or source.random() < 0.3):
                yield lemma
            if weight and len(lemma.split()) < 3:
                things.append((lemma, weight * (1 + min(20, 4 * usual.get(lemma, 0)))))
        if weight and len(synset.gloss) < 90 and source.random() < 0.6:
            yield synset.gloss
        if weight and len(synset.lemmas) > 1 and source.random() < 0.3:
            yield ", ".join(synset.lemmas[:3])
    for part in ("adj", "verb"):
        for synset in synsets(folder / f"data.{part}"):
            if source.random() < 0.3:
                yield from (lemma for lemma in synset.lemmas if len(lemma) < 25)
    words, weights = [thing for thing, _ in things], [weight for _, weight in things]
    drawn = source.choices(words, weights, k=120_000)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        yield made_caption(first, second, source)


def made_caption(first: str, second: str, source: random.Random) -> str:
    """A caption such as scenes have, of any two nouns."""
    place = source.choice(PLACES[source.choice(list(PLACES))])
    a, b = one(first), one(second)
    forms = [
        a, a, a, first,
        f"{a} {place}", f"{a} on {one(source.choice(list(BACKGROUNDS)))} background",
        one(f"{source.choice(list(HUES))} {first}"), f"{a} and {b}", f"{a} riding {b}", f"{a} under {b}",
        f"{a} next to {b}", f"{source.choice(NUMBERS[source.choice([2, 3, 4])])} {several(first)}",
        source.choice(FRAMES).format(a), f"{a}, {source.choice(list(STYLE_WORDS.values()))}",
    ]  # fmt: skip
    return source.choice(forms)


if __name__ == "__main__":
    sys.exit(main())
