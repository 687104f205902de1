"""What watches a batch while it is denoised, and afterwards explains each of its pictures with files beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sdcli.denoise.guess import seen_and_guessed
from sdcli.denoise.loop import Step
from sdcli.images import from_pixels
from sdcli.pipeline import Painter, scheduler_for
from sdcli.request import GenerationRequest
from sdcli.settings import OutputSettings, TraceSettings
from sdcli.trace import Moment, animation, check_chosen, chosen, strip

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
    return [_tracing(output.trace)] if output.trace is not None else []


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
        self._scheduler = scheduler_for(self.painter.model, self.requests[0])

    def see(self, step: Step) -> None:
        """Keep a step that is asked for."""
        if step.index == 0:
            self._passes += 1
            if self._passes == 1:
                check_chosen(self.asked.steps, step.count, self.requests[0].final_size)
        if step.index + 1 in chosen(self.asked.steps, step.count):
            x, guess = seen_and_guessed(self._scheduler, step)
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
