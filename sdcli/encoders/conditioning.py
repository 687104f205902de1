"""Requests -> the conditions of the denoiser: CLIP hidden states, labels of classes, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdcli.encoders.clip import ClipTextEncoder, ProjectedClipTextEncoder
from sdcli.encoders.condition import Conditioning, ConditioningSchedule
from sdcli.encoders.t5 import LENGTH, T5Tokenizer
from sdcli.encoders.textual_inversion import CLIP_G, CLIP_L, Embeddings, read_embeddings
from sdcli.encoders.token_words import Context
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import BadWeights, UsageError
from sdcli.request.fields import EmbeddingRef
from sdcli.request.prompt_syntax import EMPTY, Chunk, Prompts, Text
from sdcli.request.schema import ResolvedRequest


class Encode(Protocol):
    """Resolved requests -> the conditioning of the network, on the model's device and in its dtype."""

    def __call__(self, requests: Sequence[ResolvedRequest], *, guided: bool, steps: int) -> ConditioningSchedule:
        """The conditions of one pass of a batch of one `shape`; with the unconditional rows if `guided`."""
        ...

    def shape(self, request: ResolvedRequest) -> Hashable:
        """What requests must have in common to be in one batch. Raises UsageError for what the model cannot do."""
        ...

    def read(self, request: ResolvedRequest) -> Context:
        """The tokens that its prompt comes to. Raises UsageError where there are none, or others at other steps."""
        ...


@dataclass(frozen=True)
class ClipReader:
    """A CLIP text encoder with the tokenizer that makes its input."""

    tokenizer: ClipTokenizer
    network: ClipTextEncoder


@dataclass(frozen=True)
class T5Reader:
    """A T5 text encoder with the tokenizer that makes its input."""

    tokenizer: T5Tokenizer
    network: nn.Module


@dataclass(frozen=True)
class _Script:
    """What the text encoder reads for one image."""

    prompts: Prompts
    length: int
    """Chunks of the longest text, the negative one's too where the image is guided; the others are padded to it."""
    clip_skip: int
    size: tuple[int, int]
    """Height and width of the image."""
    embeddings: tuple[EmbeddingRef, ...]


class TextEncoding:
    """Encodes prompts with one CLIP text encoder, each chunk alone and once, so that no image depends on its batch.

    `model` is the model's name in error messages. `readers` may be empty where nothing will be encoded.
    """

    usual_clip_skip: ClassVar[int] = 1

    def __init__(self, model: str, readers: Sequence[ClipReader]) -> None:
        self._name, self._readers = model, tuple(readers)
        self._chunks = lru_cache(maxsize=256)(self._split)
        self._encode_once = lru_cache(maxsize=256)(self._encode)
        self._embeddings = lru_cache(maxsize=8)(self._read_embeddings)

    def __call__(self, requests: Sequence[ResolvedRequest], *, guided: bool, steps: int) -> ConditioningSchedule:
        """`encoder_hidden_states` [rows, chunks x L, D]."""
        scripts = [self._script(request, steps=steps) for request in requests]
        prompts = [script.prompts.positive for script in scripts]
        by_row = [
            *([script.prompts.negative for script in scripts] if guided else ()),
            *itertools.chain(*zip(*prompts, strict=True)),
        ]
        rows = list(zip(itertools.cycle(scripts), by_row, strict=False))

        @lru_cache(maxsize=2)
        def condition(texts: tuple[Text, ...]) -> Conditioning:
            negatives = len(scripts) if guided else 0
            return Conditioning.rows(
                [
                    self._row(text, script, negative=place < negatives)
                    for place, (text, (script, _)) in enumerate(zip(texts, rows, strict=True))
                ]
            )

        weights = tuple(tuple(prompt.weight for prompt in row) for row in zip(*prompts, strict=True))
        return ConditioningSchedule(
            lambda step: condition(tuple(prompt.at(step) for _, prompt in rows)),
            changes=any(len(prompt.texts) > 1 for _, prompt in rows),
            weights=weights if len(weights) > 1 else (),
        )

    def shape(self, request: ResolvedRequest) -> Hashable:
        """How many chunks and prompts there are: those of other images must not pad this one's."""
        scripts = [self._script(request, steps=steps) for steps in request.passes]
        return tuple((script.length, len(script.prompts.positive)) for script in scripts)

    def read(self, request: ResolvedRequest) -> Context:
        """The chunks of its prompts, padded as they are encoded."""
        scripts = [self._script(request, steps=steps) for steps in request.passes]
        script = scripts[0]
        texts = {tuple(text for prompt in one.prompts.positive for _, text in prompt.texts) for one in scripts}
        if len(texts) > 1 or len({one.length for one in scripts}) > 1 or len(*texts) > len(script.prompts.positive):
            raise UsageError(f"the words of {request.full_prompt!r} change over the steps, so none has a place")
        chunked = [self._chunks(text, script.embeddings) for text in texts.pop()]
        padded = [(*chunks, *[EMPTY] * (script.length - len(chunks))) for chunks in chunked]
        return Context(
            ids=tuple(token for chunks in padded for chunk in chunks for token in self._tokenizer.framed(chunk.ids)),
            embeddings=self._embeddings(script.embeddings).tokens,
            cut=self._tokenizer(request.full_prompt).cut if request.prompt_syntax == "plain" else "",
        )

    def _script(self, request: ResolvedRequest, *, steps: int) -> _Script:
        prompts, embeddings = request.prompts[steps], request.embeddings
        skip, layers = request.clip_skip or self.usual_clip_skip, self._layers
        if skip > layers:
            raise UsageError(f"clip_skip: {self._name}'s text encoder has {layers} layers, so not {skip}")
        read = (*prompts.positive, *([prompts.negative] if request.guided else []))
        length = max(len(self._chunks(text, embeddings)) for prompt in read for _, text in prompt.texts)
        size = request.height, request.width
        return _Script(prompts, length, skip, size, embeddings)

    def _row(self, text: Text, script: _Script, *, negative: bool) -> Conditioning:
        """One row of the condition: the chunks' hidden states side by side, all else as of the first chunk."""
        chunks = self._chunks(text, script.embeddings)
        padded = (*chunks, *[EMPTY] * (script.length - len(chunks)))
        encoded = [self._encode_once(chunk, script.clip_skip, script.embeddings) for chunk in padded]
        hidden = torch.cat([one.inputs["encoder_hidden_states"] for one in encoded], dim=1)
        return Conditioning({**encoded[0].inputs, "encoder_hidden_states": hidden})

    @property
    def _layers(self) -> int:
        return min(reader.network.config.num_hidden_layers for reader in self._readers)

    @property
    def _tokenizer(self) -> ClipTokenizer:
        return self._readers[-1].tokenizer  # those of one model differ in the padding alone

    @property
    def _device(self) -> torch.device:
        return next(self._readers[-1].network.parameters()).device

    def _split(self, text: Text, embeddings: tuple[EmbeddingRef, ...]) -> tuple[Chunk, ...]:
        return self._tokenizer.chunks(text, tokens=self._embeddings(embeddings).tokens)

    @torch.inference_mode()
    def _encode(self, chunk: Chunk, clip_skip: int, embeddings: tuple[EmbeddingRef, ...]) -> Conditioning:
        ids = torch.tensor([self._tokenizer.framed(chunk.ids)], device=self._device)
        vectors = next(iter(self._embeddings(embeddings).vectors), None)
        hidden: Tensor = self._readers[0].network(ids, clip_skip=clip_skip, vectors=vectors)
        return Conditioning({"encoder_hidden_states": emphasised(hidden, chunk)})

    @property
    def _widths(self) -> Mapping[str, int]:
        """The width of each text encoder's vectors, by the encoder's name in embedding files."""
        return {CLIP_L: self._readers[0].network.config.hidden_size}

    def _read_embeddings(self, embeddings: tuple[EmbeddingRef, ...]) -> Embeddings:
        read = read_embeddings(embeddings, widths=self._widths, most=self._tokenizer.room, model=self._name)
        parameter = next(self._readers[0].network.parameters())
        return Embeddings(read.tokens, tuple(vectors.to(parameter) for vectors in read.vectors))


MEAN_IS_ZERO = 1e-6
"""Of the mean size of the numbers; the states of a network that was not trained have such a mean."""


def emphasised(hidden: Tensor, chunk: Chunk) -> Tensor:
    """Hidden states [1, L, D] times the weights of their tokens, scaled back to the mean they had.

    A1111's emphasis "Original" (sd_emphasis.py); computed in float32.
    """
    if not set(chunk.weights) - {1.0}:
        return hidden
    weights = (1.0, *chunk.weights)
    factors = torch.ones(hidden.shape[1], device=hidden.device)
    factors[: len(weights)] = torch.tensor(weights, device=hidden.device)
    states = hidden.float()
    weighted = states * factors[:, None]
    mean = weighted.mean()
    if mean.abs() > MEAN_IS_ZERO * weighted.abs().mean():  # else the quotient would be that of two rounding errors
        weighted = weighted * (states.mean() / mean)
    return weighted.to(hidden.dtype)


class JoinedEncoding(TextEncoding):
    """The states of two CLIP text encoders side by side, and the embeddings of the text that they have of it.

    A long prompt's embedding is that of its first chunk, as in A1111.
    """

    usual_clip_skip: ClassVar[int] = 2
    pooled_name: ClassVar[str]
    """What the network calls the embedding of the text."""

    @torch.inference_mode()
    def _encode(self, chunk: Chunk, clip_skip: int, embeddings: tuple[EmbeddingRef, ...]) -> Conditioning:
        states, pooled = [], []
        tables = self._embeddings(embeddings).vectors or itertools.repeat(None)
        for reader, vectors in zip(self._readers, tables, strict=False):
            ids = torch.tensor([reader.tokenizer.framed(chunk.ids)], device=self._device)
            layers = reader.network.hidden_states(ids, vectors=vectors)
            states.append(emphasised(layers[-clip_skip], chunk))
            if isinstance(reader.network, ProjectedClipTextEncoder):
                pooled.append(reader.network.pooled(layers[-1], ids))
        joined = {"encoder_hidden_states": states, self.pooled_name: pooled}
        return Conditioning({name: torch.cat(rows, dim=-1) for name, rows in joined.items()})

    @property
    def _widths(self) -> Mapping[str, int]:
        names = (CLIP_L, CLIP_G)[-len(self._readers) :]  # a refiner has the second encoder alone
        return {name: reader.network.config.hidden_size for name, reader in zip(names, self._readers, strict=True)}


AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""The scores that condition SDXL's refiner, of the image and of the unconditional half; diffusers' defaults."""
TOP_LEFT = (0, 0)
"""Where the image was cut from its original: nowhere, so its subject stays whole."""


class SdxlEncoding(JoinedEncoding):
    """SDXL's: the states of two text encoders (the refiner has the second alone), an embedding of the text, and sizes.

    Podell et al. 2023 (arXiv 2307.01952), sections 2.1, 2.2 and 2.5; every number as in diffusers'
    StableDiffusionXLPipeline (tests/test_sdxl.py).
    """

    pooled_name: ClassVar[str] = "text_embeds"

    def __init__(
        self, model: str, readers: Sequence[ClipReader], *, unet: Mapping[str, Any], zeros_for_empty: bool
    ) -> None:
        """`unet` is the UNet's configuration; `zeros_for_empty`: an empty negative prompt is all zeros."""
        super().__init__(model, readers)
        self._unet, self._zeros_for_empty = unet, zeros_for_empty

    def _row(self, text: Text, script: _Script, *, negative: bool) -> Conditioning:
        """A row of the texts' condition, with `time_ids`; an empty negative prompt may be all zeros."""
        inputs = super()._row(text, script, negative=negative).inputs
        if negative and not text.text and self._zeros_for_empty:
            inputs = {name: torch.zeros_like(rows) for name, rows in inputs.items()}
        score = NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE
        last = (score,) if self._room_for_numbers(inputs) == 5 else script.size
        time_ids = torch.tensor([[*script.size, *TOP_LEFT, *last]], dtype=torch.float32, device=self._device)
        return Conditioning({**inputs, "time_ids": time_ids})

    def _room_for_numbers(self, inputs: Mapping[str, Tensor]) -> int:
        """How many numbers the UNet takes beside the texts: 6 for sizes, 5 where a score stands for the last two."""
        config = self._unet
        rest = (config.get("projection_class_embeddings_input_dim") or 0) - inputs["text_embeds"].shape[-1]
        room, odd = divmod(rest, config.get("addition_time_embed_dim") or 1)
        if (
            config.get("addition_embed_type") != "text_time"
            or config["cross_attention_dim"] != inputs["encoder_hidden_states"].shape[-1]
            or odd
            or room not in (5, 6)
        ):
            raise BadWeights(f"{self._name}: its UNet does not fit its text encoders")
        return room


class Sd3Encoding(JoinedEncoding):
    """Stable Diffusion 3's: the states of two CLIP text encoders, padded with zeros to the width of T5's, then T5's.

    Esser et al. 2024 (arXiv 2403.03206), section 4; every number as in diffusers' StableDiffusion3Pipeline
    (tests/test_sd3.py), which has zeros for an absent T5, too. T5 reads the words without their weights.
    """

    pooled_name: ClassVar[str] = "pooled_projections"

    def __init__(
        self,
        model: str,
        readers: Sequence[ClipReader],
        *,
        t5: T5Reader | None,
        transformer: Mapping[str, Any],
        cell: int,
    ) -> None:
        """`transformer` is the configuration of the denoiser; a latent cell has `cell` pixels a side."""
        super().__init__(model, readers)
        self._t5_reader, self._transformer, self._cell = t5, transformer, cell
        self._t5_once = lru_cache(maxsize=64)(self._t5)

    def shape(self, request: ResolvedRequest) -> Hashable:
        """As of any text; and the transformer has positions for images up to a size."""
        config = self._transformer
        most = config["pos_embed_max_size"] * config["patch_size"] * self._cell
        if max(request.final_size) > most:
            raise UsageError(f"{self._name} generates images of at most {most} pixels a side")
        return super().shape(request)

    def read(self, request: ResolvedRequest) -> Context:
        """Raises UsageError: words are attended to together with the image."""
        raise UsageError(f"{request.model} attends to words and image jointly, so there are no maps of its words")

    def _row(self, text: Text, script: _Script, *, negative: bool) -> Conditioning:
        inputs = super()._row(text, script, negative=negative).inputs
        clip, config = inputs["encoder_hidden_states"], self._transformer
        t5 = self._t5_once(text.unweighted)
        room, pooled = t5.shape[-1] - clip.shape[-1], inputs[self.pooled_name].shape[-1]
        if room < 0 or (t5.shape[-1], pooled) != (config["joint_attention_dim"], config["pooled_projection_dim"]):
            raise BadWeights(f"{self._name}: its transformer does not fit its text encoders")
        hidden = torch.cat([functional.pad(clip, (0, room)), t5.to(clip)], dim=1)
        return Conditioning({**inputs, "encoder_hidden_states": hidden})

    @torch.inference_mode()
    def _t5(self, text: str) -> Tensor:
        """[1, 256, D]"""
        if self._t5_reader is None:
            return torch.zeros(1, LENGTH, self._transformer["joint_attention_dim"], device=self._device)
        ids = torch.tensor([self._t5_reader.tokenizer(text)], device=self._device)
        states: Tensor = self._t5_reader.network(ids)[0]
        return states


class ClassEncoding:
    """Names of classes (or their numbers) -> labels; an empty name is the class that stands for none."""

    def __init__(self, label: Callable[[str], int], device: torch.device) -> None:
        """`label` gives the label of a class by its name, or raises UsageError."""
        self._label, self._device = label, device

    def __call__(self, requests: Sequence[ResolvedRequest], *, guided: bool, steps: int) -> ConditioningSchedule:
        """`class_labels` [rows], int64. Raises UsageError for an unknown class."""
        names = [request.negative_prompt for request in requests] if guided else []
        names += [request.full_prompt for request in requests]
        labels = torch.tensor([self._label(name) for name in names], device=self._device)
        return ConditioningSchedule(lambda step: Conditioning({"class_labels": labels}))

    def shape(self, request: ResolvedRequest) -> Hashable:
        """All labels fit together."""
        return None

    def read(self, request: ResolvedRequest) -> Context:
        """Raises UsageError: a class has no tokens."""
        raise UsageError(f"{request.model} generates a class, so there are no words")


class NoEncoding:
    """The encoding of a model that generates without a prompt."""

    def __call__(self, requests: Sequence[ResolvedRequest], *, guided: bool, steps: int) -> ConditioningSchedule:
        """Nothing at any step."""
        return ConditioningSchedule(lambda step: Conditioning())

    def shape(self, request: ResolvedRequest) -> Hashable:
        """Nothing fits with nothing."""
        return None

    def read(self, request: ResolvedRequest) -> Context:
        """Raises UsageError: there is no prompt."""
        raise UsageError(f"{request.model} generates without words")
