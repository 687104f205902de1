"""What watches a batch while it is denoised: to show it, and to explain each image with files beside it."""

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
from sdcli.diffusion.pipeline import Pipeline
from sdcli.diffusion.x0_prediction import x0_predictor
from sdcli.encoders.token_words import Word, find, words_of
from sdcli.errors import UsageError
from sdcli.generation.observers.heatmap import Heatmap, Map
from sdcli.generation.observers.heatmap import files as heatmap_files
from sdcli.generation.observers.trace import Moment, animation, check_chosen, chosen, strip
from sdcli.generation.settings import OutputSettings, TraceSettings
from sdcli.images.contact_sheet import contact_sheet, empty
from sdcli.images.pixels import from_pixels
from sdcli.models.safety_checker import SafetyChecker
from sdcli.request.schema import ResolvedRequest
from sdcli.vae.latent_preview import latent_preview

Decode = Callable[[Tensor], Tensor]
"""x [C, h, w] -> pixels [3, H, W] in 0..1. Raises OutOfMemory and BadOutput."""
File = tuple[str, bytes]
"""What follows the image's stem in the file's name, and what is in it."""


class Observer(Protocol):
    """Sees the steps of one batch. It changes none of them."""

    def see(self, step: Step) -> None:
        """A step is done. Raises UsageError where what is asked for cannot be."""

    def files(self, position: int, pixels: Tensor) -> Iterator[File]:
        """What explains the image at that place in the batch, whose pixels are [3, H, W] in 0..1."""


Observe = Callable[[Pipeline, Sequence[ResolvedRequest], Decode], AbstractContextManager[Observer]]
"""Watches one batch of resolved requests, from before its first step until after its last."""


def observers_for(output: OutputSettings) -> list[Observe]:
    """Those that are asked for."""
    found = [_tracing(output.trace)] if output.trace is not None else []
    return [*found, _mapping(output.heatmap)] if output.heatmap is not None else found


def check(pipeline: Pipeline, request: ResolvedRequest, output: OutputSettings) -> None:
    """Raise UsageError for an image that cannot be explained as is asked."""
    if output.heatmap is not None:
        requested_words(pipeline, request, output.heatmap)


def preview_image(
    pipeline: Pipeline, requests: Sequence[ResolvedRequest], step: Step, checker: SafetyChecker | None = None
) -> Image.Image:
    """The images as the network guesses them at a step, quickly decoded; several of them on one sheet.

    Where the checker flags one, its place is empty.
    """
    _, guess = x0_predictor(pipeline, requests[0])(step)
    images = [from_pixels(latent_preview(pipeline.space, x)) for x in guess]
    if checker is not None:
        images = [empty(image.size) if checker.flags(image) else image for image in images]
    return images[0] if len(images) == 1 else contact_sheet(images)


def _tracing(asked: TraceSettings) -> Observe:
    return lambda pipeline, requests, decode: contextlib.nullcontext(Tracing(pipeline, requests, decode, asked))


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

    pipeline: Pipeline
    requests: Sequence[ResolvedRequest]
    decode: Decode
    asked: TraceSettings
    _seen: list[_Seen] = field(default_factory=list)
    _passes: int = 0

    def __post_init__(self) -> None:
        self._guesses = x0_predictor(self.pipeline, self.requests[0])

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


def _mapping(words: Sequence[str]) -> Observe:
    @contextlib.contextmanager
    def observe(pipeline: Pipeline, requests: Sequence[ResolvedRequest], decode: Decode) -> Iterator[Observer]:
        joined = requests[0].prompts[requests[0].passes[0]].weights
        with AttentionMaps(len(requests), prompts=max(1, len(joined))).watching(pipeline.model.unet) as maps:
            yield HeatMapping(pipeline, requests, words, maps)

    return observe


@dataclass(frozen=True)
class HeatMapping:
    """Sums up where the network attends to each token, and tells it apart by words."""

    pipeline: Pipeline
    requests: Sequence[ResolvedRequest]
    words: Sequence[str]
    maps: AttentionMaps

    def see(self, step: Step) -> None:
        """Note at what size the maps of a step are."""
        height, width = step.x.shape[-2:]
        self.maps.step((height, width))

    def files(self, position: int, pixels: Tensor) -> Iterator[File]:
        """The folder of maps."""
        tokens = self.maps.mean(position)
        asked = requested_words(self.pipeline, self.requests[position], self.words)

        def of(words: Sequence[Word]) -> dict[str, Map]:
            return {word.text: tokens[list(word.places)].sum(dim=0).numpy() for word in words}

        heatmap = Heatmap(of(asked.words), of(asked.apart), tokens.numpy(), asked.absent, asked.cut)
        for name, data in heatmap_files(heatmap, from_pixels(pixels)):
            yield f".heatmap/{name}", data


@dataclass(frozen=True)
class Requested:
    """Words of a prompt that are asked for, what is no word, what was asked for and is not there, what did not fit."""

    words: list[Word]
    apart: list[Word]
    absent: list[str]
    cut: str


def requested_words(pipeline: Pipeline, request: ResolvedRequest, asked: Sequence[str]) -> Requested:
    """Those of a prompt, or all of its words where none are named. Raises UsageError where there are none."""
    context = pipeline.encode.read(request)
    tokenizer = pipeline.model.tokenizer or pipeline.model.tokenizer_2
    assert tokenizer is not None
    words, apart = words_of(tokenizer, context)
    found = {phrase: find(tokenizer, context, phrase) for phrase in asked}
    chosen = [word for word in found.values() if word is not None] if asked else words
    if not chosen:
        what = f"none of {', '.join(map(repr, asked))} is" if asked else "there is no word"
        raise UsageError(f"--heatmap: {what} in the prompt {request.full_prompt!r} as the text encoder reads it")
    return Requested(chosen, apart, [phrase for phrase, word in found.items() if word is None], context.cut)
