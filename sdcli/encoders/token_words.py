"""Which of the tokens that a text encoder read are which word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.request.prompt_syntax import Span, units


@dataclass(frozen=True)
class Context:
    """What the network attends to for one image, token by token."""

    ids: tuple[int, ...]
    """Of every chunk, start, end and padding included; where AND joins prompts, as many of each, one after another."""
    embeddings: Mapping[str, range] = field(default_factory=dict)
    """Words that stand for rows of vectors, which have the ids -1 - row."""
    cut: str = ""
    """The end of the prompt, where it did not fit."""


@dataclass(frozen=True)
class Word:
    """A word, or a phrase, and the places of its tokens in the context, wherever it stands."""

    text: str
    places: tuple[int, ...]


def words_of(tokenizer: ClipTokenizer, context: Context) -> tuple[list[Word], list[Word]]:
    """The words of a context, each once, and the tokens that belong to no word: start, end, padding, punctuation.

    Every place is in exactly one of them.
    """
    words: dict[str, list[int]] = {}
    apart: dict[str, list[int]] = {"start": [], "end": [], "padding": [], "punctuation": []}
    inside: list[int] = []
    ended = False
    for place, token in enumerate(context.ids):
        if token == tokenizer.start_id:
            apart["start"].append(place)
            ended = False
        elif ended:
            apart["padding"].append(place)
        elif token == tokenizer.end_id:
            apart["end"].append(place)
            ended = True
        else:
            inside.append(place)
    for text, places in _spelled(tokenizer, context, inside):
        if any(letter.isalnum() for letter in text):
            words.setdefault(text, []).extend(places)
        else:
            apart["punctuation"] += places
    return _words(words), _words(apart)


def find(tokenizer: ClipTokenizer, context: Context, phrase: str) -> Word | None:
    """Where a word, or several that follow each other, stand in a context; None where they do not."""
    units_of_phrase = units([Span(phrase, 1.0)], tokenizer.words, context.embeddings)
    wanted = tuple(id for ids, _ in units_of_phrase for id in ids)
    starts = [place for place in range(len(context.ids)) if context.ids[place : place + len(wanted)] == wanted]
    places = dict.fromkeys(start + offset for start in starts for offset in range(len(wanted)))
    return Word(phrase, tuple(places)) if places else None


def _words(places: Mapping[str, Sequence[int]]) -> list[Word]:
    return [Word(text, tuple(found)) for text, found in places.items() if found]


def _spelled(tokenizer: ClipTokenizer, context: Context, places: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Words and their places: up to a token that ends a word, and what `_goes_on`."""
    words: list[tuple[str, list[int]]] = []
    here: list[int] = []
    for place in places:
        token = context.ids[place]
        if token < 0:
            words.append((_embedded(context, token), [place]))
            continue
        here.append(place)
        if tokenizer.ends_word(token):
            text = tokenizer.spelled(*(context.ids[one] for one in here))
            if words and _goes_on(words[-1][0], text):
                text, here = words[-1][0] + text, words.pop()[1] + here
            words.append((text, here))
            here = []
    if here:
        words.append((tokenizer.spelled(*(context.ids[one] for one in here)), here))
    yield from words


def _embedded(context: Context, token: int) -> str:
    return next(word for word, rows in context.embeddings.items() if -1 - token in rows)


def _goes_on(word: str, text: str) -> bool:
    """Whether CLIP cut a word in two there: before an apostrophe, and between digits."""
    return (text.startswith("'") and len(text) > 1) or (text.isdigit() and word[-1:].isdigit())
