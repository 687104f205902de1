"""Collect the training texts of the starter's text encoder: captions, and the words of WordNet.

    python scripts/starter/texts.py WORK

writes WORK/texts.txt, one text per line, for `sdcli train-text-encoder WORK/texts.txt --teacher ...`: names, plurals
and tags of the starter's things (repeated, so that they weigh more), captions of scenes, WordNet's nouns, adjectives
and verbs with their glosses, and captions with nouns of WordNet in place of the things. So words that no caption
contains get their meaning from the teacher. The dictionary comes from Debian's package wordnet-base, which
`apt-get download` saves in WORK/packages once; --wordnet names another copy.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from scenes import BACKGROUNDS, FRAMES, HUES, KINDS, NUMBERS, PLACES, STYLE_WORDS, Composer
from wordnet import THINGS, counts, fetch, synsets
from words import UNSEEN, plural, singular

NAME_REPEATS = 8
"""Repetitions of each name, to weight it against other texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py wrote")
    parser.add_argument("--wordnet", type=Path, help="WordNet's folder, with data.noun")
    parser.add_argument("--captions", type=int, default=60_000, help="number of scene captions (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="random seed (%(default)s)")
    chosen = parser.parse_args()
    wordnet = chosen.wordnet or fetch(chosen.work / "packages")
    source = random.Random(chosen.seed)
    composer = Composer(chosen.work)
    texts = [text for text in names(composer) for _ in range(NAME_REPEATS)]
    texts += scene_captions(composer, source, chosen.captions)
    texts += dictionary(wordnet, source)
    source.shuffle(texts)
    (chosen.work / "texts.txt").write_text("\n".join([*texts, ""]), encoding="utf-8")
    print(f"{len(texts)} texts, {len(set(texts))} different ones")


def names(composer: Composer) -> list[str]:
    """Every name with and without article, in the plural, and with its tags; also the words of `UNSEEN`."""
    texts: dict[str, None] = {}
    for concept in composer.concepts:
        for name in concept.names:
            texts |= dict.fromkeys([name, singular(name), plural(name)])
        if concept.tags:
            texts[f"{concept.name}, {', '.join(concept.tags)}"] = None
            texts |= dict.fromkeys(concept.tags)
    for word in UNSEEN:
        texts |= dict.fromkeys([word, singular(word), plural(word)])
    return list(texts)


def scene_captions(composer: Composer, source: random.Random, count: int) -> list[str]:
    """A caption of each of `count` scenes."""
    kinds = source.choices(list(KINDS), list(KINDS.values()), k=count)
    return [source.choice(composer.plan(kind, source).captions) for kind in kinds]


def dictionary(folder: Path, source: random.Random) -> Iterator[str]:
    """WordNet's words and glosses, and captions with its nouns."""
    frequencies = counts(folder)
    things: list[tuple[str, int]] = []
    for synset in synsets(folder / "data.noun"):
        weight = THINGS.get(synset.file, 0)
        for lemma in synset.lemmas:
            if len(lemma) < 25 and (weight or source.random() < 0.3):
                yield lemma
            if weight and len(lemma.split()) < 3:
                things.append((lemma, weight * (1 + min(20, 4 * frequencies.get(lemma, 0)))))
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
        yield random_caption(first, second, source)


def random_caption(first: str, second: str, source: random.Random) -> str:
    """A random caption in the form of the scenes', for any two nouns."""
    place = source.choice(PLACES[source.choice(list(PLACES))])
    a, b = singular(first), singular(second)
    forms = [
        a, a, a, first,
        f"{a} {place}", f"{a} on {singular(source.choice(list(BACKGROUNDS)))} background",
        singular(f"{source.choice(list(HUES))} {first}"), f"{a} and {b}", f"{a} riding {b}", f"{a} under {b}",
        f"{a} next to {b}", f"{source.choice(NUMBERS[source.choice([2, 3, 4])])} {plural(first)}",
        source.choice(FRAMES).format(a), f"{a}, {source.choice(list(STYLE_WORDS.values()))}",
    ]  # fmt: skip
    return source.choice(forms)


if __name__ == "__main__":
    sys.exit(main())
