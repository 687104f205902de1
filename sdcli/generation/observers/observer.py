"""Observers: they record the steps of a batch, change none of them, and explain each image with files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.generation.events import SideFile
from sdcli.request.schema import ResolvedRequest

Decode = Callable[[Tensor], Tensor]
"""x [C, h, w] -> pixels [3, H, W] in 0..1. Raises OutOfMemory and BadOutput."""


class Recording(Protocol):
    """What an observer keeps of the steps of one batch."""

    def add(self, step: Step) -> None:
        """Record a finished step. Raises UsageError for settings that do not fit the steps."""

    def files(self, position: int, pixels: Tensor) -> Iterator[SideFile]:
        """The side files of the image at that place in the batch, whose pixels are [3, H, W] in 0..1."""


class Observer(Protocol):
    """A way of explaining images; one serves any number of batches."""

    def check(self, pipeline: Pipeline, request: ResolvedRequest) -> None:
        """Raise UsageError for an image that it cannot explain."""

    def record(
        self, pipeline: Pipeline, requests: Sequence[ResolvedRequest], decode: Decode
    ) -> AbstractContextManager[Recording]:
        """The recording of one batch of resolved requests, open from before its first step until after its last."""
