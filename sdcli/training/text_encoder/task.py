"""`sdcli train-text-encoder`: train a small CLIP text encoder from a sentence encoder, or teach one further words.

caption -> tokens -> hidden states -+-> state at the end token, projected ~ the teacher's vector        "distil"
                                    +-> all states ~ those of the first caption of the same image       "align"

A UNet attends to the state of every token, and the encoder is causal: a state depends on the text up to its token. The
states that "align" learns are those of the encoder before this run: a UNet that knows "car" then knows "automobile".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.encoders.clip import ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import UsageError
from sdcli.io import rng
from sdcli.io.files import write_whole
from sdcli.request.schema import did_you_mean
from sdcli.training.inputs.order import Order, Size
from sdcli.training.task import Batch, Draw, Losses, Networks, OptimizerPhase
from sdcli.training.text_encoder.caption_files import Captions
from sdcli.training.text_encoder.items import TextItems
from sdcli.training.text_encoder.losses import info_nce, matching_positions
from sdcli.training.text_encoder.network import first_end, new_projection, write_text_encoder
from sdcli.training.text_encoder.vocabulary import save_tokenizer

TextObjective = Literal["distil", "align"]
OBJECTIVES: tuple[TextObjective, ...] = get_args(TextObjective)
REMOVED_OBJECTIVES = ("lm", "contrastive", "distil-word")
"""Objectives of earlier versions, which old settings files may name."""
ENCODER, PROJECTION = "text_encoder", "text_projection"
MAX_HELD_OUT = 1000
"""Groups of captions; more would make validation longer and hardly more precise."""
VALIDATION_BATCH = 256
PROJECTION_SAMPLES = 8192
"""Captions that the projection of a pretrained encoder is fitted on."""
RIDGE = 1e-4
"""Regularisation of that fit, relative to the mean square of a channel."""
ALIGNED_PADDING = 4
"""Padding positions after the longest text that are aligned too."""
LENGTH_STEP = 4
"""Batches are cut to a multiple of this, so that there are few shapes."""
SHEET_CAPTIONS, SHEET_NEAREST, SHEET_CANDIDATES = 8, 5, 2000
"""A sample sheet lists so many captions, with the nearest ones of each among so many candidates."""


def parse_objectives(names: Sequence[str], *, teacher: bool) -> dict[TextObjective, float]:
    """`["distil", "align:0.2"]` -> weights by objective; without names: distil where there is a teacher.

    Raises UsageError for an unknown or removed objective, a repeated one, a weight that is not positive, and for a
    teacher without distil or distil without a teacher.
    """
    if not names and not teacher:
        raise UsageError(
            "nothing to learn from: add --teacher to distil a sentence encoder, or --model with --objective align "
            "(lm, the default of earlier versions, was removed)"
        )
    weights: dict[TextObjective, float] = {}
    for text in names or ["distil"]:
        name, colon, number = text.partition(":")
        if name.strip() in REMOVED_OBJECTIVES:
            raise UsageError(
                f"--objective {name.strip()} was removed; use distil with a --teacher, or align with a --model"
            )
        objective = next((known for known in OBJECTIVES if known == name.strip()), None)
        if objective is None:
            raise UsageError(f"--objective {name}: unknown objective{did_you_mean(name, OBJECTIVES)}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UsageError(f"--objective {text}: the weight must be a number above 0")
        if objective in weights:
            raise UsageError(f"--objective {objective} is given twice")
        weights[objective] = weight
    if "distil" in weights and not teacher:
        raise UsageError("--objective distil learns from a sentence encoder: add --teacher")
    if teacher and "distil" not in weights:
        raise UsageError("--teacher has no effect without --objective distil")
    return weights


@dataclass
class TextEncoderTask:
    """Trains a text encoder on captions (`training.task.Task`). Raises UsageError for a combination that cannot train.

    `batch` is the total batch size. `vectors` are the teacher's unit vectors [n, D], one for each text; distil needs
    them. Distil compares a caption with the others of its micro-batch, so the micro-batch's size matters there.
    """

    captions: Captions
    tokenizer: ClipTokenizer
    encoder: ClipTextEncoder
    objectives: Mapping[TextObjective, float]
    batch: int
    seed: int
    learning_rate: float
    vectors: Tensor | None = None
    validation_split: float = 0.05
    word_dropout: float = 0.0
    """Share of words that distil leaves out of captions."""
    temperature: float = 0.05
    """Of InfoNCE (van den Oord et al. 2018); 0.05 as in SimCSE (Gao et al. 2021)."""
    pretrained: bool = False
    """Whether the encoder has been trained before: the projection to the teacher's vectors then starts as a fit."""
    infonce_weight: float = 0.1
    """Of InfoNCE in distil, added to 1 - cosine."""
    networks: dict[str, nn.Module] = field(init=False)
    averaged: tuple[str, ...] = field(init=False)
    original: ClipTextEncoder | None = field(init=False, repr=False, default=None)
    """The encoder as it was before this run, whose states align learns."""
    phases: Sequence[OptimizerPhase] = field(init=False)
    items: TextItems = field(init=False, repr=False)
    order: Order = field(init=False, repr=False)
    trained: np.ndarray = field(init=False, repr=False)
    """Indices of the captions that are trained on, int64."""
    held_out: np.ndarray = field(init=False, repr=False)
    """Indices of the validation captions, int64."""

    def __post_init__(self) -> None:
        self._check()
        self.items = TextItems.of(
            self.captions,
            self.tokenizer,
            vectors=self.vectors.float() if self.vectors is not None else None,
            with_first="align" in self.objectives,
            word_dropout=self.word_dropout,
        )
        self.networks = {ENCODER: self.encoder}
        if "align" in self.objectives:
            self.original = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        if self.vectors is not None:
            width = self.encoder.config.hidden_size
            self.networks[PROJECTION] = new_projection(width, self.vectors.shape[1], seed=self.seed)
        self.averaged = tuple(self.networks)  # a projection fits only the encoder that it was trained with
        self.phases = (OptimizerPhase(ENCODER, [self._group(name) for name in self.networks], self.loss),)
        held_out = _hold_out(self.items.first, self.validation_split, self.seed)
        self.trained, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if not len(self.trained):
            raise UsageError("no caption is left to train on; a smaller --validation-split leaves more")
        lengths = self.items.lengths()[self.trained]
        if self.pretrained and PROJECTION in self.networks:
            self._fit_projection(_spread(self.trained[np.argsort(lengths, kind="stable")], PROJECTION_SAMPLES))
        buckets = by_length(self.trained, lengths + 1, min_count=self.batch)
        self.order = Order(buckets, batch=self.batch, seed=self.seed)

    def _check(self) -> None:
        objectives = self.objectives
        if not objectives:
            raise UsageError(f"no --objective: it is one of {', '.join(OBJECTIVES)}")
        if ("distil" in objectives) != (self.vectors is not None):
            raise UsageError("--objective distil and --teacher need each other")
        if self.vectors is not None and len(self.vectors) != len(self.captions.texts):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.captions.texts)} captions")
        if "align" in objectives and not self.captions.has_alternatives:
            raise UsageError(
                "--objective align teaches an image's captions the states of its first one, and no image has two"
            )
        if "align" in objectives and not self.pretrained:
            raise UsageError("--objective align preserves the states of a trained text encoder: add --model")
        if "distil" in objectives and self.batch < 2:
            raise UsageError(
                "distil compares a caption with the others of its batch: --train-batch-size must be at least 2"
            )
        if self.word_dropout and "align" in objectives:
            raise UsageError(
                "--word-dropout would break the sentences that --objective align compares; give one of them"
            )
        if not 0 <= self.word_dropout < 1:
            raise UsageError(f"--word-dropout is a share of the words from 0 to below 1, not {self.word_dropout}")

    def _group(self, name: str) -> dict[str, Any]:
        return {"name": name, "params": dict(self.networks[name].named_parameters()), "lr": self.learning_rate}

    # Samples

    def draws(self, step: int) -> list[Draw]:
        return self.order.draws(step)

    def item(self, draw: Draw) -> dict[str, Any]:
        return self.items.item(draw.index, draw=rng.scalars(self.seed, draw.counter, "text"))

    def item_name(self, index: int) -> str:
        return repr(self.captions.texts[index])

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """Stack the items and cut them after the longest caption; the encoder is causal, so this changes no state.

        With align some of the padding stays, because a UNet attends to it too; the rest of it is much the same.
        """
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        sequences = [name for name in ("token_ids", "first_ids") if name in batch]
        longest = max(int(first_end(batch[name], self.tokenizer.end_id).max()) + 1 for name in sequences)
        longest += ALIGNED_PADDING if "first_ids" in batch else 0
        length = min(self.tokenizer.max_length, math.ceil(longest / LENGTH_STEP) * LENGTH_STEP)
        return {**batch, **{name: batch[name][:, :length] for name in sequences}}

    # The losses

    def loss(self, networks: Networks, batch: Batch) -> Losses:
        """The weighted sum of the objectives, and each of them where there are several."""
        return self._losses(self._outputs(networks, batch))

    def _losses(self, outputs: _Outputs) -> Losses:
        terms = {name: _TERMS[name](self, outputs) for name in self.objectives}
        total = torch.stack([terms[name] * weight for name, weight in self.objectives.items()]).sum()
        shown: dict[str, Tensor] = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        if outputs.students is not None:
            shown["cosine"] = (outputs.students * outputs.batch["teacher"]).sum(dim=1).mean().detach()
        return Losses(total, shown)

    def _outputs(self, networks: Networks, batch: Batch) -> _Outputs:
        ids = batch["token_ids"]
        hidden = networks[ENCODER](ids)
        states = hidden[torch.arange(len(ids), device=ids.device), first_end(ids, self.tokenizer.end_id)]
        students = None
        if "teacher" in batch:
            students = F.normalize(networks[PROJECTION](states).float(), dim=1)
        return _Outputs(batch, states.float(), hidden.float(), students)

    def _distil(self, outputs: _Outputs) -> Tensor:
        """1 - cosine to the teacher's vector, plus InfoNCE against the other captions of the micro-batch."""
        students, teacher, text = outputs.students, outputs.batch["teacher"], outputs.batch["text"]
        assert students is not None
        equal = text[:, None] == text[None]
        nce = info_nce(students, teacher, alike=equal, temperature=self.temperature).mean()
        return (1 - (students * teacher).sum(dim=1)).mean() + self.infonce_weight * nce

    def _align(self, outputs: _Outputs) -> Tensor:
        """The squared distance to the first caption's states in units of their mean square, so 2 for unrelated states.

        Half of it is over the words and the first end token, half over the padding.
        """
        assert self.original is not None
        batch, states, end_id = outputs.batch, outputs.hidden, self.tokenizer.end_id
        with torch.no_grad():
            first = self.original.to(states.device)(batch["first_ids"]).float()
            positions = matching_positions(batch["token_ids"], batch["first_ids"], end_id=end_id)
            first = first.gather(1, positions[..., None].expand_as(first))
        squares = (states - first).square().sum(dim=2)
        squares = squares / first.square().sum(dim=2).mean(dim=1, keepdim=True)
        text = torch.arange(squares.shape[1], device=squares.device) <= first_end(batch["token_ids"], end_id)[:, None]
        parts = [(squares * part).sum(dim=1) / part.sum(dim=1).clamp(min=1) for part in (text, ~text)]
        return torch.stack(parts).mean()

    # Validation

    @torch.no_grad()
    def validate(self, networks: Networks) -> dict[str, float]:
        """Over the held-out captions: the loss; with a teacher also the mean cosine to its vectors, and how often a
        caption's own vector is the nearest."""
        if not len(self.held_out):
            return {}
        outputs = list(self._outputs_of(networks, self.held_out))
        losses = sum(float(self._losses(part).loss) * len(part.batch["token_ids"]) for part in outputs)
        figures = {"loss": losses / len(self.held_out)}
        if self.items.vectors is not None:
            students = torch.cat([part.students for part in outputs if part.students is not None]).cpu()
            teachers = self.items.vectors[torch.from_numpy(self.held_out)]
            figures["cosine"] = float((students * teachers).sum(dim=1).mean())
            figures["retrieval"] = _retrieval(students, teachers, self.items.texts[self.held_out])
        return figures

    @torch.no_grad()
    def _fit_projection(self, indices: np.ndarray) -> None:
        """Set the projection to the ridge regression from the encoder's states to the teacher's vectors.

        The captions should be sorted by length, so that batches hold little padding.
        """
        outputs = list(self._outputs_of(self.networks, indices))
        states = torch.cat([part.states for part in outputs]).double()
        vectors = torch.cat([part.batch["teacher"] for part in outputs]).double()
        squares = states.T @ states
        squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
        weight = torch.linalg.solve(squares, states.T @ vectors).T
        self.networks[PROJECTION].load_state_dict({"weight": weight.float()})

    def _outputs_of(self, networks: Networks, indices: np.ndarray) -> Iterator[_Outputs]:
        """The networks' outputs for captions with all their words, one batch at a time."""
        device = next(networks[ENCODER].parameters()).device
        for first in range(0, len(indices), VALIDATION_BATCH):
            yield self._outputs(networks, self._fixed_batch(indices[first : first + VALIDATION_BATCH], first, device))

    def _fixed_batch(self, indices: np.ndarray, first: int, device: torch.device) -> Batch:
        """A batch that is the same at every validation, without word dropout."""
        items = [
            self.items.item(int(index), draw=rng.scalars(self.seed, place, "validation"), word_dropout=0.0)
            for place, index in enumerate(indices, start=first)
        ]
        return {name: tensor.to(device) for name, tensor in self.collate(items).items()}

    # Files

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """`text_encoder`, `text_encoder_ema` where there is one, `tokenizer`. The projection is not part of a model."""
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        write_text_encoder(folder / ENCODER, networks[ENCODER], networks[ENCODER].state_dict())
        if ENCODER in averages:
            write_text_encoder(folder / f"{ENCODER}_ema", averages[ENCODER], averages[ENCODER].state_dict())

    @torch.no_grad()
    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """A text file with some captions, held-out ones if there are any, and the nearest other captions of each."""
        chosen = _spread(self.held_out if len(self.held_out) else self.trained, SHEET_CAPTIONS)
        among = np.concatenate([_spread(self.trained, SHEET_CANDIDATES), _spread(self.held_out, SHEET_CANDIDATES)])
        among = among[np.unique(self.items.texts[among], return_index=True)[1]]
        states = self._states(networks, np.concatenate([chosen, among]))
        similarity = states[: len(chosen)] @ states[len(chosen) :].T
        lines = []
        for row, index in zip(similarity, chosen, strict=True):
            lines.append(self.captions.texts[index])
            others = row.masked_fill(torch.from_numpy(self.items.texts[among] == self.items.texts[index]), -math.inf)
            values, places = others.topk(min(SHEET_NEAREST, len(among)))
            lines += [
                f"  {value:.3f}  {self.captions.texts[among[place]]}"
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
                if value > -math.inf
            ]
        path = folder / f"nearest-{step}.txt"
        write_whole(path, "\n".join([*lines, ""]).encode(), overwrite=True)
        return [path]

    def _states(self, networks: Networks, indices: np.ndarray) -> Tensor:
        """Unit states [n, D] of captions on the CPU, projected to the teacher's width where there is a teacher."""
        parts = [
            outputs.students if outputs.students is not None else F.normalize(outputs.states, dim=1)
            for outputs in self._outputs_of(networks, indices)
        ]
        return torch.cat(parts).float().cpu()


@dataclass(frozen=True)
class _Outputs:
    """The networks' outputs for a batch of B captions."""

    batch: Batch
    states: Tensor
    """[B, D], at the first end token."""
    hidden: Tensor
    """All states of the captions, [B, L, D]."""
    students: Tensor | None
    """The projected states, unit vectors [B, D of the teacher]."""


_TERMS: dict[TextObjective, Callable[[TextEncoderTask, _Outputs], Tensor]] = {
    "distil": TextEncoderTask._distil,
    "align": TextEncoderTask._align,
}


def by_length(indices: np.ndarray, tokens: np.ndarray, *, min_count: int) -> dict[Size, np.ndarray]:
    """Buckets of captions that are cut to the same length, so that a step computes little padding.

    `tokens` [n] counts start and end. Buckets of fewer than `min_count` captions are merged into the next longer one,
    the last of them into the next shorter one.
    """
    lengths = -(-tokens // LENGTH_STEP) * LENGTH_STEP
    buckets: dict[Size, np.ndarray] = {}
    pending = np.zeros(0, dtype=np.int64)
    for length in np.unique(lengths).tolist():
        pending = np.concatenate([pending, indices[lengths == length]])
        if len(pending) >= min_count:
            buckets[length, 1] = np.sort(pending)
            pending = pending[:0]
    if len(pending):
        longest = next(reversed(buckets), (int(lengths.max()), 1))
        buckets[longest] = np.sort(np.concatenate([buckets.get(longest, pending[:0]), pending]))
    return buckets


def _hold_out(first: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which captions are held out, bool [n]: whole groups, so that no alternative of theirs is trained on."""
    count = len(first) - 1
    held = min(math.ceil(count * share), MAX_HELD_OUT, count - 1) if share > 0 else 0
    chosen = np.zeros(count, dtype=bool)
    chosen[rng.permutation(seed, 0, "held out", count)[:held]] = True
    return np.repeat(chosen, np.diff(first))


def _retrieval(students: Tensor, teachers: Tensor, texts: np.ndarray) -> float:
    """Share of rows whose nearest teacher vector is that of their own text, among texts that occur once each."""
    once = torch.from_numpy(np.sort(np.unique(texts, return_index=True)[1]))
    nearest = (students[once] @ teachers[once].T).argmax(dim=1)
    return float((nearest == torch.arange(len(once))).double().mean())


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spaced."""
    if not len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(np.int64)]
