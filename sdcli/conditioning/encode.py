"""Requests -> the conditions of the denoiser: CLIP hidden states, labels of classes, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sdcli.conditioning.condition import Condition, Conditions
from sdcli.conditioning.embeddings import Embeddings, read_embeddings
from sdcli.conditioning.prompt import EMPTY, Chunk, SubPrompt, subprompts
from sdcli.conditioning.tokenizer import ClipTokenizer
from sdcli.conditioning.words import Context
from sdcli.errors import UsageError
from sdcli.loading import LoadedModel
from sdcli.request import EmbeddingRef, GenerationRequest, known


class Encode(Protocol):
    """Resolved requests -> what they tell the network, on the model's device and in its dtype."""

    def __call__(self, requests: Sequence[GenerationRequest], *, guided: bool, steps: int) -> Conditions:
        """The conditions of one pass of a batch of one `shape`; with the unconditional rows if `guided`."""
        ...

    def shape(self, request: GenerationRequest) -> Hashable:
        """What requests must have in common to be in one batch. Raises UsageError for what the model cannot do."""
        ...

    def read(self, request: GenerationRequest) -> Context:
        """The tokens that its prompt comes to. Raises UsageError where there are none, or others at other steps."""
        ...


def encoding_of(model: LoadedModel) -> Encode:
    """The encoding that a model was trained with."""
    match model.spec.kind.conditioning:
        case "text":
            return TextEncoding(model)
        case "class":
            return ClassEncoding(model)
        case "none":
            return NoEncoding()


@dataclass(frozen=True)
class _Script:
    """What the text encoder reads for one picture."""

    prompts: tuple[SubPrompt, ...]
    """Those that AND joins."""
    negative: SubPrompt
    length: int
    """Chunks of the longest text, the negative one's too where the picture is guided; the others are padded to it."""
    syntax: str
    clip_skip: int
    embeddings: tuple[EmbeddingRef, ...]


class TextEncoding:
    """Encodes prompts with one model, each chunk alone and once: a picture does not depend on its neighbours."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._chunks = lru_cache(maxsize=256)(self._split)
        self._encode_once = lru_cache(maxsize=256)(self._encode)
        self._embeddings = lru_cache(maxsize=8)(self._read_embeddings)

    def __call__(self, requests: Sequence[GenerationRequest], *, guided: bool, steps: int) -> Conditions:
        """`encoder_hidden_states` [rows, chunks x L, D]."""
        scripts = [self._script(request, steps=steps) for request in requests]
        prompts = [script.prompts for script in scripts]
        by_row = [
            *([script.negative for script in scripts] if guided else ()),
            *itertools.chain(*zip(*prompts, strict=True)),
        ]
        rows = list(zip(itertools.cycle(scripts), by_row, strict=False))

        @lru_cache(maxsize=2)
        def condition(texts: tuple[str, ...]) -> Condition:
            hidden = [self._row(text, script) for text, (script, _) in zip(texts, rows, strict=True)]
            return Condition({"encoder_hidden_states": torch.cat(hidden)})

        weights = tuple(tuple(prompt.weight for prompt in row) for row in zip(*prompts, strict=True))
        return Conditions(
            lambda step: condition(tuple(prompt.at(step) for _, prompt in rows)),
            changes=any(len(prompt.texts) > 1 for _, prompt in rows),
            weights=weights if len(weights) > 1 else (),
        )

    def shape(self, request: GenerationRequest) -> Hashable:
        """How many chunks and prompts there are: those of other pictures must not pad this one's."""
        scripts = [self._script(request, steps=steps) for steps in request.passes]
        return tuple((script.length, len(script.prompts)) for script in scripts)

    def read(self, request: GenerationRequest) -> Context:
        """The chunks of its prompts, padded as they are encoded."""
        scripts = [self._script(request, steps=steps) for steps in request.passes]
        script = scripts[0]
        texts = {tuple(text for prompt in one.prompts for _, text in prompt.texts) for one in scripts}
        if len(texts) > 1 or len({one.length for one in scripts}) > 1 or len(*texts) > len(script.prompts):
            raise UsageError(f"the words of {request.painted_prompt!r} change over the steps, so none has a place")
        chunked = [self._chunks(text, script.syntax, script.embeddings) for text in texts.pop()]
        padded = [(*chunks, *[EMPTY] * (script.length - len(chunks))) for chunks in chunked]
        return Context(
            ids=tuple(token for chunks in padded for chunk in chunks for token in self._tokenizer.framed(chunk.ids)),
            prompts=len(script.prompts),
            embeddings=self._embeddings(script.embeddings).tokens,
            cut=self._tokenizer(request.painted_prompt).cut if script.syntax == "plain" else "",
        )

    def _script(self, request: GenerationRequest, *, steps: int) -> _Script:
        syntax, skip, embeddings = known(request.prompt_syntax), request.clip_skip or 1, request.embeddings
        layers = self._model.text_encoder.config.num_hidden_layers
        if skip > layers:
            raise UsageError(f"clip_skip: {self._model.spec.name}'s text encoder has {layers} layers, so not {skip}")
        prompts = subprompts(request.painted_prompt, steps=steps, syntax=syntax)
        (negative,) = subprompts(known(request.negative_prompt), steps=steps, syntax=syntax, compose=False)
        texts = {text for prompt in (*prompts, *([negative] if request.guided else [])) for _, text in prompt.texts}
        length = max(len(self._chunks(text, syntax, embeddings)) for text in texts)
        return _Script(prompts, negative, length, syntax, skip, embeddings)

    def _row(self, text: str, script: _Script) -> Tensor:
        chunks = self._chunks(text, script.syntax, script.embeddings)
        padded = (*chunks, *[EMPTY] * (script.length - len(chunks)))
        return torch.cat([self._encode_once(chunk, script.clip_skip, script.embeddings) for chunk in padded], dim=1)

    @property
    def _tokenizer(self) -> ClipTokenizer:
        return known(self._model.tokenizer)  # absent where the text encoder was not loaded, and nothing is encoded

    def _split(self, text: str, syntax: str, embeddings: tuple[EmbeddingRef, ...]) -> tuple[Chunk, ...]:
        return self._tokenizer.chunks(text, syntax=syntax, tokens=self._embeddings(embeddings).tokens)

    @torch.inference_mode()
    def _encode(self, chunk: Chunk, clip_skip: int, embeddings: tuple[EmbeddingRef, ...]) -> Tensor:
        ids = torch.tensor([self._tokenizer.framed(chunk.ids)], device=self._model.device)
        vectors = self._embeddings(embeddings).vectors
        hidden: Tensor = self._model.text_encoder(ids, clip_skip=clip_skip, vectors=vectors)
        return emphasised(hidden, (1.0, *chunk.weights)) if set(chunk.weights) - {1.0} else hidden

    def _read_embeddings(self, embeddings: tuple[EmbeddingRef, ...]) -> Embeddings:
        model = self._model
        width, room = model.text_encoder.config.hidden_size, self._tokenizer.room
        read = read_embeddings(embeddings, width=width, most=room, model=model.spec.name)
        return Embeddings(read.tokens, None if read.vectors is None else read.vectors.to(model.device, model.dtype))


def emphasised(hidden: Tensor, weights: Sequence[float]) -> Tensor:
    """Hidden states [1, L, D] times the weights of their first tokens, scaled back to the mean they had.

    A1111's emphasis "Original" (sd_emphasis.py); computed in float32.
    """
    factors = torch.ones(hidden.shape[1], device=hidden.device)
    factors[: len(weights)] = torch.tensor(weights, device=hidden.device)
    states = hidden.float()
    weighted = states * factors[:, None]
    return (weighted * (states.mean() / weighted.mean())).to(hidden.dtype)


class ClassEncoding:
    """Names of classes (or their numbers) -> labels; an empty name is the class that stands for none."""

    def __init__(self, model: LoadedModel) -> None:
        self._kind, self._device = model.spec.kind, model.device

    def __call__(self, requests: Sequence[GenerationRequest], *, guided: bool, steps: int) -> Conditions:
        """`class_labels` [rows], int64. Raises UsageError for an unknown class."""
        names = [known(request.negative_prompt) for request in requests] if guided else []
        names += [request.painted_prompt for request in requests]
        labels = torch.tensor([self._kind.label(name) for name in names], device=self._device)
        return Conditions(lambda step: Condition({"class_labels": labels}))

    def shape(self, request: GenerationRequest) -> Hashable:
        """All labels fit together."""
        return None

    def read(self, request: GenerationRequest) -> Context:
        """Raises UsageError: a class is no word."""
        raise UsageError(f"{request.model} paints a class, so there are no words")


class NoEncoding:
    """The encoding of a model that paints without a prompt."""

    def __call__(self, requests: Sequence[GenerationRequest], *, guided: bool, steps: int) -> Conditions:
        """Nothing at any step."""
        return Conditions(lambda step: Condition())

    def shape(self, request: GenerationRequest) -> Hashable:
        """Nothing fits with nothing."""
        return None

    def read(self, request: GenerationRequest) -> Context:
        """Raises UsageError: there is no prompt."""
        raise UsageError(f"{request.model} paints without words")
