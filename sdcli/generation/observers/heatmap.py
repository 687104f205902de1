"""The attention heatmap of an image: where the network attended to each word of the prompt while it generated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdcli.diffusion.attention.maps import AttentionMaps
from sdcli.diffusion.loop import Step
from sdcli.diffusion.pipeline import Pipeline
from sdcli.encoders.token_words import Word, find, words_of
from sdcli.errors import UsageError
from sdcli.generation.events import SideFile
from sdcli.generation.observers.heatmap_files import Heatmap, Map
from sdcli.generation.observers.heatmap_files import files as heatmap_files
from sdcli.generation.observers.observer import Decode
from sdcli.images.pixels import from_pixels
from sdcli.request.schema import ResolvedRequest


@dataclass(frozen=True)
class HeatmapObserver:
    """Maps the attention to these words of each prompt, or to every word where none are named."""

    words: Sequence[str]

    def check(self, pipeline: Pipeline, request: ResolvedRequest) -> None:
        """Raise UsageError for a prompt that has none of the words, and for steps that run few of the layers."""
        if request.reuse is not None and request.reuse > 1:
            raise UsageError("--heatmap does not go with --reuse, where most steps run few of the layers it maps")
        words_in_prompt(pipeline, request, self.words)

    @contextlib.contextmanager
    def record(
        self, pipeline: Pipeline, requests: Sequence[ResolvedRequest], decode: Decode
    ) -> Iterator[HeatmapRecording]:
        """A recording that sums up attention; until it ends, the network has other attention processors."""
        joined = requests[0].prompts[requests[0].passes[0]].weights
        with AttentionMaps(len(requests), prompts=max(1, len(joined))).recording(pipeline.model.unet) as maps:
            yield HeatmapRecording(pipeline, requests, self.words, maps)


@dataclass(frozen=True)
class HeatmapRecording:
    """The attention to each token of the prompts of one batch."""

    pipeline: Pipeline
    requests: Sequence[ResolvedRequest]
    words: Sequence[str]
    maps: AttentionMaps

    def add(self, step: Step) -> None:
        """Add the attention of a step, whose latents give the maps their size."""
        height, width = step.x.shape[-2:]
        self.maps.step((height, width))

    def files(self, position: int, pixels: Tensor) -> Iterator[SideFile]:
        """The folder of maps."""
        tokens = self.maps.mean(position)
        found = words_in_prompt(self.pipeline, self.requests[position], self.words)

        def of(words: Sequence[Word]) -> dict[str, Map]:
            return {word.text: tokens[list(word.places)].sum(dim=0).numpy() for word in words}

        heatmap = Heatmap(of(found.words), of(found.other), tokens.numpy(), found.absent, found.cut)
        for name, data in heatmap_files(heatmap, from_pixels(pixels)):
            yield f".heatmap/{name}", data


@dataclass(frozen=True)
class PromptWords:
    """The words of a prompt to map, other tokens, words that are not in the prompt, and the part that was cut."""

    words: list[Word]
    other: list[Word]
    absent: list[str]
    cut: str


def words_in_prompt(pipeline: Pipeline, request: ResolvedRequest, named: Sequence[str]) -> PromptWords:
    """The `named` words of a prompt, or all words where none are named. Raises UsageError where none is found."""
    context = pipeline.encode.read(request)
    tokenizer = next(iter(pipeline.model.tokenizers.values()))
    words, other = words_of(tokenizer, context)
    found = {phrase: find(tokenizer, context, phrase) for phrase in named}
    chosen = [word for word in found.values() if word is not None] if named else words
    if not chosen:
        problem = f"none of {', '.join(map(repr, named))} is" if named else "there is no word"
        raise UsageError(f"--heatmap: {problem} in the prompt {request.full_prompt!r} as the text encoder reads it")
    return PromptWords(chosen, other, [phrase for phrase, word in found.items() if word is None], context.cut)
