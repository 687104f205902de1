"""What watches a batch while it is denoised: to show it, and to explain each picture with files beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor

from sdcli.diffusion.attention.maps import AttentionMaps
from sdcli.diffusion.loop import Step
from sdcli.diffusion.painter import Painter
from sdcli.diffusion.pipeline import scheduler_for
from sdcli.diffusion.x0_prediction import seen_and_guessed
from sdcli.encoders.token_words import Word, find, words_of
from sdcli.errors import UsageError
from sdcli.generation.observers.heatmap import Heatmap, Map
from sdcli.generation.observers.heatmap import files as heatmap_files
from sdcli.generation.observers.trace import Moment, animation, check_chosen, chosen, strip
from sdcli.generation.settings import OutputSettings, TraceSettings
from sdcli.images.contact_sheet import contact_sheet, empty
from sdcli.images.pixels import from_pixels
from sdcli.models.safety_checker import SafetyChecker
from sdcli.request.schema import GenerationRequest, known
from sdcli.vae.latent_preview import glance

Decode = Callable[[Tensor], Tensor]
"""x [C, h, w] -> pixels [3, H, W] in 0..1. Raises OutOfMemory and BadOutput."""
File = tuple[str, bytes]
"""What follows the picture's stem in the file's name, and what is in it."""


class Watcher(Protocol):
    """Sees the steps of one batch. It changes none of them."""

    def see(self, step: Step) -> None:
        """A step is done. Raises UsageError where what is asked for cannot be."""

    def files(self, position: int, pixels: Tensor) -> Iterator[File]:
        """What explains the picture at that place in the batch, whose pixels are [3, H, W] in 0..1."""


Watch = Callable[[Painter, Sequence[GenerationRequest], Decode], AbstractContextManager[Watcher]]
"""Watches one batch of resolved requests, from before its first step until after its last."""


def watches(output: OutputSettings) -> list[Watch]:
    """Those that are asked for."""
    found = [_tracing(output.trace)] if output.trace is not None else []
    return [*found, _mapping(output.heatmap)] if output.heatmap is not None else found


def check(painter: Painter, request: GenerationRequest, output: OutputSettings) -> None:
    """Raise UsageError for a picture that cannot be explained as is asked."""
    if output.heatmap is not None:
        asked_words(painter, request, output.heatmap)


def glimpse(
    painter: Painter, requests: Sequence[GenerationRequest], step: Step, checker: SafetyChecker | None = None
) -> Image.Image:
    """The pictures as the network guesses them at a step, quickly decoded; several of them on one sheet.

    Where the checker flags one, its place is empty.
    """
    _, guess = guesses_of(painter, requests[0])(step)
    pictures = [from_pixels(glance(painter.space, x)) for x in guess]
    if checker is not None:
        pictures = [empty(picture.size) if checker.flags(picture) else picture for picture in pictures]
    return pictures[0] if len(pictures) == 1 else contact_sheet(pictures)


def guesses_of(painter: Painter, request: GenerationRequest) -> Callable[[Step], tuple[Tensor, Tensor]]:
    """`seen_and_guessed` for the steps of a request, whose last ones may be a refiner's with a scheduler of its own."""
    base = scheduler_for(painter.model, request)
    if painter.refiner is None:
        return lambda step: seen_and_guessed(base, step)
    refining = scheduler_for(painter.refiner.model, request)
    begins = float(base.config.num_train_timesteps) * (1 - known(request.refiner_start))

    def guess(step: Step) -> tuple[Tensor, Tensor]:
        either = (base, refining) if float(step.t) >= begins else (refining, base)
        return seen_and_guessed(next(one for one in either if (one.timesteps == step.t).any()), step)

    return guess


def _tracing(asked: TraceSettings) -> Watch:
    return lambda painter, requests, decode: contextlib.nullcontext(Tracing(painter, requests, decode, asked))


@dataclass(frozen=True)
class _Seen:
    number: int
    count: int
    t: float
    x: Tensor
    guess: Tensor
    second_pass: bool


@dataclass
class Tracing:
    """Keeps what the network was shown and what it guessed at chosen steps; decoded when the files are asked for."""

    painter: Painter
    requests: Sequence[GenerationRequest]
    decode: Decode
    asked: TraceSettings
    _seen: list[_Seen] = field(default_factory=list)
    _passes: int = 0

    def __post_init__(self) -> None:
        self._guesses = guesses_of(self.painter, self.requests[0])

    def see(self, step: Step) -> None:
        """Keep a step that is asked for."""
        if step.index == 0:
            self._passes += 1
            if self._passes == 1:
                check_chosen(self.asked.steps, step.count, self.requests[0].final_size)
        if step.index + 1 in chosen(self.asked.steps, step.count):
            x, guess = self._guesses(step)
            second = self._passes == 2
            self._seen.append(_Seen(step.index + 1, step.count, float(step.t), x.cpu(), guess.cpu(), second))

    def files(self, position: int, pixels: Tensor) -> Iterator[File]:
        """The strip and the animation."""
        moments = [
            Moment(
                seen.number,
                seen.count,
                seen.t,
                seen=from_pixels(self.decode(seen.x[position])),
                guess=from_pixels(self.decode(seen.guess[position])),
                second_pass=seen.second_pass,
            )
            for seen in self._seen
        ]
        yield ".trace.png", strip(moments)
        yield f".trace.{self.asked.format}", animation(moments, format=self.asked.format)


def _mapping(words: Sequence[str]) -> Watch:
    @contextlib.contextmanager
    def watch(painter: Painter, requests: Sequence[GenerationRequest], decode: Decode) -> Iterator[Watcher]:
        joined = painter.encode(requests, guided=False, steps=requests[0].passes[0]).weights
        with AttentionMaps(len(requests), prompts=max(1, len(joined))).watching(painter.model.unet) as maps:
            yield HeatMapping(painter, requests, words, maps)

    return watch


@dataclass(frozen=True)
class HeatMapping:
    """Sums up where the network attends to each token, and tells it apart by words."""

    painter: Painter
    requests: Sequence[GenerationRequest]
    words: Sequence[str]
    maps: AttentionMaps

    def see(self, step: Step) -> None:
        """Note at what size the maps of a step are."""
        height, width = step.x.shape[-2:]
        self.maps.step((height, width))

    def files(self, position: int, pixels: Tensor) -> Iterator[File]:
        """The folder of maps."""
        tokens = self.maps.mean(position)
        asked = asked_words(self.painter, self.requests[position], self.words)

        def of(words: Sequence[Word]) -> dict[str, Map]:
            return {word.text: tokens[list(word.places)].sum(dim=0).numpy() for word in words}

        heatmap = Heatmap(of(asked.words), of(asked.apart), tokens.numpy(), asked.absent, asked.cut)
        for name, data in heatmap_files(heatmap, from_pixels(pixels)):
            yield f".heatmap/{name}", data


@dataclass(frozen=True)
class Asked:
    """Words of a prompt that are asked for, what is no word, what was asked for and is not there, what did not fit."""

    words: list[Word]
    apart: list[Word]
    absent: list[str]
    cut: str


def asked_words(painter: Painter, request: GenerationRequest, asked: Sequence[str]) -> Asked:
    """Those of a prompt, or all of its words where none are named. Raises UsageError where there are none."""
    context = painter.encode.read(request)
    tokenizer = known(painter.model.tokenizer or painter.model.tokenizer_2)
    words, apart = words_of(tokenizer, context)
    found = {phrase: find(tokenizer, context, phrase) for phrase in asked}
    chosen = [word for word in found.values() if word is not None] if asked else words
    if not chosen:
        what = f"none of {', '.join(map(repr, asked))} is" if asked else "there is no word"
        raise UsageError(f"--heatmap: {what} in the prompt {request.painted_prompt!r} as the text encoder reads it")
    return Asked(chosen, apart, [phrase for phrase, word in found.items() if word is None], context.cut)
