"""Training a small CLIP text encoder: on the next token, on alternative captions, on a teacher's sentence vectors, or
on its own states for other words.

caption -> tokens -> hidden states -+-> next token, by the tied embedding            "lm"
                                    +-> state at the end ~ state of another caption  "contrastive"
                                    +-> state at the end, projected ~ teacher's      "distil"
                                    +-> state at the last word, by the same projection ~ teacher's   "distil-word"
                                    +-> all states ~ those of the image's first caption            "align"

A UNet attends to every word's state, and the encoder is causal: the state at a word is that of the text up to it. What
"align" learns are the states that the encoder gave before this run: a UNet that knows "car" then knows "automobile".
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdcli.encoders.clip import ACTIVATIONS, ClipTextConfig, ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import UsageError
from sdcli.io import rng
from sdcli.io.files import write_whole
from sdcli.io.weights import empty_network, fill
from sdcli.request.schema import did_you_mean
from sdcli.training.inputs.order import Order, Size
from sdcli.training.state.state_files import write_tensors
from sdcli.training.task import Batch, Draw, Losses, Networks, OptimizerPhase
from sdcli.training.text_encoder.caption_files import Captions
from sdcli.training.text_encoder.items import TextItems
from sdcli.training.text_encoder.vocabulary import save_tokenizer

Objective = Literal["lm", "contrastive", "distil", "distil-word", "align"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
ENCODER, PROJECTION = "text_encoder", "text_projection"
MOST_HELD_OUT = 1000
"""Groups of captions; more would tell little more, and validation should be short."""
VALIDATION_BATCH = 256
FITTED = 8192
"""Captions that the projection of an encoder that has learned before is fitted to."""
RIDGE = 1e-4
"""Of that fit, relative to the mean square of a channel."""
PADDING = 4
"""Places behind the longest text that are aligned."""
LENGTH_STEP = 4
"""Batches are cut to a multiple of this, so that they come in few shapes."""
SHOWN, NEAREST, COMPARED = 8, 5, 2000
"""Sample sheet: so many held-out captions, the nearest of each, among so many others."""


def parse_objectives(names: Sequence[str], *, teacher: bool) -> dict[Objective, float]:
    """`["distil", "lm:0.2"]` -> weights by objective; nothing asked is distil where there is a teacher, else lm.

    Raises UsageError for what is unknown, given twice, not positive, or does not go with the teacher.
    """
    weights: dict[Objective, float] = {}
    for text in names or ["distil" if teacher else "lm"]:
        name, colon, number = text.partition(":")
        objective = next((known for known in OBJECTIVES if known == name.strip()), None)
        if objective is None:
            raise UsageError(f"--objective {name}: no such objective{did_you_mean(name, OBJECTIVES)}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UsageError(f"--objective {text}: the weight should be a number above 0")
        if objective in weights:
            raise UsageError(f"--objective {objective} is given twice")
        weights[objective] = weight
    if "distil" in weights and not teacher:
        raise UsageError("--objective distil learns from a sentence encoder: add --teacher")
    if "distil-word" in weights and "distil" not in weights:
        raise UsageError("--objective distil-word goes with --objective distil: they share a projection")
    if teacher and "distil" not in weights:
        raise UsageError("--teacher has no effect without --objective distil")
    return weights


# The network


class TrainedTextEncoder(ClipTextEncoder):
    """The text encoder with what its losses need; its parameters are those of `ClipTextEncoder` and no others."""

    def forward(self, token_ids: Tensor, scored: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Token ids [B, L] -> states [B, D] at the first end token and at the token before it, the surprise [scored] of
        the first rows, and all states [B, L, D].

        The surprise of a caption is the sum of -log p(next token) in nats, from the first word to the end token, by the
        token embedding as output layer (Press & Wolf 2017). One call for all, so that autocast and DDP see all of it.
        """
        hidden = super().forward(token_ids)
        ends = first_end(token_ids, self.config.eos_token_id)
        rows = torch.arange(len(hidden), device=hidden.device)
        surprise = hidden.new_zeros((scored, token_ids.shape[1] - 1), dtype=torch.float32)
        if scored:
            # Only where a word or the end follows: what is padding predicts nothing.
            places = torch.arange(token_ids.shape[1] - 1, device=ends.device) < ends[:scored, None]
            logits = F.linear(hidden[:scored, :-1][places], self.embeddings.token_embedding.weight)
            surprise[places] = F.cross_entropy(logits.float(), token_ids[:scored, 1:][places], reduction="none")
        return hidden[rows, ends], hidden[rows, ends - 1], surprise.sum(dim=1), hidden


def first_end(token_ids: Tensor, end_id: int) -> Tensor:
    """Where each text [..., L] ends: the place [...] of its first end token; later ones are padding."""
    return (token_ids == end_id).int().argmax(dim=-1)


def same_places(tokens: Tensor, others: Tensor, *, end_id: int) -> Tensor:
    """For each token of texts [..., L] its place in other ones that say the same with other words, int64 [..., L].

    What both begin with stays; behind it places are counted from the end, so that the last tokens of two words and all
    that follows them meet. A word that has more tokens than the other's has its first ones at the place before it,
    where nothing of it is said yet.
    """
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    begins = (tokens == others).int().cumprod(-1).sum(-1, keepdim=True)
    longer = (first_end(tokens, end_id) - first_end(others, end_id))[..., None]
    behind = torch.maximum(places - longer, (begins - 1).clamp(min=0)).clamp(max=tokens.shape[-1] - 1)
    return torch.where(places < begins, places, behind)


def fit_config(config: ClipTextConfig, tokenizer: ClipTokenizer) -> ClipTextConfig:
    """A network's shape with the vocabulary and length of a tokenizer. Raises UsageError for a shape that cannot be."""
    if config.hidden_act not in ACTIVATIONS:
        raise UsageError(f"no activation {config.hidden_act!r}{did_you_mean(config.hidden_act, ACTIVATIONS)}")
    if min(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) < 1:
        raise UsageError("the text encoder needs at least one layer, one head and one channel")
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"{config.hidden_size} channels cannot be shared out evenly to {config.num_attention_heads} attention heads"
        )
    size = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return dataclasses.replace(
        config,
        vocab_size=size,
        max_position_embeddings=tokenizer.max_length,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )


def new_text_encoder(config: ClipTextConfig, tokenizer: ClipTokenizer, *, seed: int) -> TrainedTextEncoder:
    """A network with random weights in float32, for a vocabulary. Raises UsageError.

    Standard deviations are CLIP's (transformers' CLIPPreTrainedModel._init_weights; Radford et al. 2019, section 2.3,
    for the residual layers); biases are 0 and norms 1.
    """
    network = _empty(fit_config(config, tokenizer))
    narrow = config.hidden_size**-0.5
    residual = narrow * (2 * config.num_hidden_layers) ** -0.5
    deviations = {
        "embedding.weight": 0.02,
        "q_proj.weight": residual,
        "k_proj.weight": residual,
        "v_proj.weight": residual,
        "out_proj.weight": narrow,
        "fc1.weight": (2 * config.hidden_size) ** -0.5,
        "fc2.weight": residual,
    }
    tensors = {}
    for name, empty in network.state_dict().items():
        deviation = next((value for suffix, value in deviations.items() if name.endswith(suffix)), None)
        if deviation is None:
            tensors[name] = torch.full(empty.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            tensors[name] = rng.noise(seed, 0, f"weights of {name}", empty.shape) * deviation
    return _filled(network, tensors)


def copy_text_encoder(encoder: ClipTextEncoder, tokenizer: ClipTokenizer) -> TrainedTextEncoder:
    """A copy of a loaded text encoder to train on, in float32. Raises UsageError where the tokenizer does not fit."""
    own, wanted = encoder.config, fit_config(encoder.config, tokenizer)
    if wanted.vocab_size > own.vocab_size or wanted.max_position_embeddings > own.max_position_embeddings:
        raise UsageError(
            f"the text encoder knows {own.vocab_size} tokens and {own.max_position_embeddings} places, "
            f"its tokenizer gives {wanted.vocab_size} and {wanted.max_position_embeddings}"
        )
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in encoder.state_dict().items()}
    # The tokens' numbers are the tokenizer's: the files of SD 1.x name others in their config.json.
    config = dataclasses.replace(wanted, vocab_size=own.vocab_size, max_position_embeddings=own.max_position_embeddings)
    return _filled(_empty(config), tensors)


def _empty(config: ClipTextConfig) -> TrainedTextEncoder:
    return empty_network(lambda: TrainedTextEncoder(config), source="the text encoder")


def _filled(network: TrainedTextEncoder, tensors: Mapping[str, Tensor]) -> TrainedTextEncoder:
    fill(network, tensors, source="the text encoder")
    return network.requires_grad_(True).train()


def _projection(width: int, teacher_width: int, *, seed: int) -> nn.Module:
    """Linear, without bias, as CLIP's own text projection; random as it is there."""
    layer = empty_network(lambda: nn.Linear(width, teacher_width, bias=False), source=PROJECTION)
    weight = rng.noise(seed, 0, f"weights of {PROJECTION}", (teacher_width, width)) * width**-0.5
    fill(layer, {"weight": weight}, source=PROJECTION)
    return layer.requires_grad_(True).train()


def write_text_encoder(folder: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors in float32 so that transformers' CLIPTextModel loads them.

    `network` is a ClipTextEncoder; `tensors` are its weights, or others of the same names. For the inside of a
    checkpoint, which sees to it that all of it appears at once.
    """
    assert isinstance(network, ClipTextEncoder)
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **dataclasses.asdict(network.config),
        "projection_dim": network.config.hidden_size,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }
    write_tensors(folder / "model.safetensors", {name: tensor.detach().float() for name, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# The task


@dataclass
class TextEncoderTask:
    """Trains a text encoder on captions (`training.task.Task`). Raises UsageError for what cannot be trained.

    `batch` is the total batch size. `vectors` are the teacher's for each text, unit [n, D]; they are needed for distil.
    The contrastive terms compare a caption with the others of its micro-batch, so there the micro-batch's size counts.
    """

    captions: Captions
    tokenizer: ClipTokenizer
    encoder: TrainedTextEncoder
    objectives: Mapping[Objective, float]
    batch: int
    seed: int
    learning_rate: float
    vectors: Tensor | None = None
    validation_split: float = 0.05
    word_dropout: float = 0.0
    """Share of words that are left out of what is compared with a partner or a teacher."""
    temperature: float = 0.05
    """Of InfoNCE (van den Oord et al. 2018); 0.05 as in SimCSE (Gao et al. 2021)."""
    continued: bool = False
    """Whether the encoder has learned before: then the projection to the teacher's vectors begins as their best fit."""
    infonce_weight: float = 0.1
    """Of InfoNCE in distil, beside 1 - cosine."""
    networks: dict[str, nn.Module] = field(init=False)
    averaged: tuple[str, ...] = field(init=False)
    begun: TrainedTextEncoder | None = field(init=False, repr=False, default=None)
    """The encoder as it was before this run: whose states are learned in align."""
    phases: Sequence[OptimizerPhase] = field(init=False)
    items: TextItems = field(init=False, repr=False)
    order: Order = field(init=False, repr=False)
    trained: np.ndarray = field(init=False, repr=False)
    """Indices of the captions that are trained on, int64."""
    held_out: np.ndarray = field(init=False, repr=False)
    """Indices of the others."""

    def __post_init__(self) -> None:
        self._check()
        self.items = TextItems.of(
            self.captions,
            self.tokenizer,
            vectors=self.vectors.float() if self.vectors is not None else None,
            partners="contrastive" in self.objectives,
            firsts="align" in self.objectives,
            word_dropout=self.word_dropout,
        )
        self.networks = {ENCODER: self.encoder}
        if "align" in self.objectives:
            self.begun = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        if self.vectors is not None:
            width = self.encoder.config.hidden_size
            self.networks[PROJECTION] = _projection(width, self.vectors.shape[1], seed=self.seed)
        self.averaged = tuple(self.networks)  # a projection fits the encoder that it was trained with
        self.phases = (OptimizerPhase(ENCODER, [self._group(name) for name in self.networks], self.loss),)
        held_out = _hold_out(self.items.first, self.validation_split, self.seed)
        useful = (
            self.items.has_alternative() if set(self.objectives) == {"contrastive"} else np.ones(len(held_out), bool)
        )
        trained = np.flatnonzero(~held_out & useful)
        self.held_out = np.flatnonzero(held_out & useful)
        if not len(trained):
            raise UsageError("there is not one caption to train on; a smaller --validation-split leaves more")
        lengths = self.items.lengths()[trained]
        if self.continued and PROJECTION in self.networks:
            self._fit_projection(_spread(trained[np.argsort(lengths, kind="stable")], FITTED))
        self.trained = trained
        self.order = Order(by_length(trained, lengths + 1, fewest=self.batch), batch=self.batch, seed=self.seed)
        self._mean_length = float(lengths.mean())

    def _check(self) -> None:
        objectives = self.objectives
        if not objectives:
            raise UsageError(f"there is nothing to learn: --objective is one of {', '.join(OBJECTIVES)}")
        if ("distil" in objectives) != (self.vectors is not None):
            raise UsageError("--objective distil and --teacher need each other")
        if self.vectors is not None and len(self.vectors) != len(self.captions.texts):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.captions.texts)} captions")
        if "contrastive" in objectives and not self.captions.has_alternatives:
            raise UsageError(
                "--objective contrastive compares alternative captions of one picture, and no picture has two; use lm, "
                "or distil with a --teacher"
            )
        if "align" in objectives and not self.captions.has_alternatives:
            raise UsageError(
                "--objective align teaches a picture's captions the states of its first one, and no picture has two"
            )
        if "align" in objectives and not self.continued:
            raise UsageError("--objective align keeps to the states of an encoder that has learned: add --model")
        if {"contrastive", "distil"} & set(objectives) and self.batch < 2:
            raise UsageError("a caption is compared with the others of its batch: --train-batch-size must be 2 or more")
        whole = sorted({"lm", "align"} & set(objectives))
        if self.word_dropout and whole:
            raise UsageError(
                f"--word-dropout with --objective {whole[0]} would teach it broken sentences; leave one of them out"
            )
        if not 0 <= self.word_dropout < 1:
            raise UsageError(f"--word-dropout is a share of the words from 0 to below 1, not {self.word_dropout}")

    def _group(self, name: str) -> dict[str, Any]:
        return {"name": name, "params": dict(self.networks[name].named_parameters()), "lr": self.learning_rate}

    def draws(self, step: int) -> list[Draw]:
        return self.order.draws(step)

    def item(self, draw: Draw) -> dict[str, Any]:
        return self.items.item(draw.index, draw=rng.scalars(self.seed, draw.counter, "text"))

    def item_name(self, index: int) -> str:
        """What to call a sample in a message."""
        return repr(self.captions.texts[index])

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """Stacked, and cut behind the longest caption: the encoder is causal, so that what follows changes nothing.

        Some of the padding stays where it is aligned: a UNet attends to it, too, and the rest of it is much the same.
        """
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        sequences = [name for name in ("token_ids", "partner_ids", "first_ids") if name in batch]
        longest = max(int(first_end(batch[name], self.tokenizer.end_id).max()) + 1 for name in sequences)
        longest += PADDING if "first_ids" in batch else 0
        cut = min(self.tokenizer.max_length, math.ceil(longest / LENGTH_STEP) * LENGTH_STEP)
        return {**batch, **{name: batch[name][:, :cut] for name in sequences}}

    def loss(self, networks: Networks, batch: Batch) -> Losses:
        """The weighted sum of the objectives, and each of them."""
        return self._losses(self._compare(networks, batch))

    def _losses(self, compared: _Compared) -> Losses:
        terms = {name: _TERMS[name](self, compared) for name in self.objectives}
        total = torch.stack([terms[name] * weight for name, weight in self.objectives.items()]).sum()
        shown: dict[str, Tensor] = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        if compared.students is not None:
            shown["cosine"] = (compared.students * compared.batch["teacher"]).sum(dim=1).mean().detach()
        return Losses(total, shown)

    def _compare(self, networks: Networks, batch: Batch) -> _Compared:
        ids = batch["token_ids"]
        rows = len(ids)
        everything = torch.cat([ids, batch["partner_ids"]]) if "partner_ids" in batch else ids
        states, words, surprise, hidden = networks[ENCODER](everything, rows if "lm" in self.objectives else 0)
        students = word_students = None
        if "teacher" in batch:
            both = torch.cat([states[:rows], words[:rows]]) if "distil-word" in self.objectives else states[:rows]
            projected = F.normalize(networks[PROJECTION](both).float(), dim=1)  # one call, as DDP wants it
            students, word_students = projected[:rows], projected[rows:]
        own, partners = states[:rows].float(), states[rows:].float()
        return _Compared(batch, own, partners, surprise, hidden[:rows].float(), students, word_students)

    def _lm(self, found: _Compared) -> Tensor:
        # By the mean length over all captions, not over these: so the loss of a step is the mean of its micro-batches'.
        return found.surprise.mean() / self._mean_length

    def _contrastive(self, found: _Compared) -> Tensor:
        anchors, partners = F.normalize(found.states, dim=1), F.normalize(found.partners, dim=1)
        batch = found.batch
        alike = _equal(batch["group"], batch["group"]) | _equal(batch["text"], batch["partner_text"])
        losses = info_nce(anchors, partners, alike=alike, temperature=self.temperature)
        paired = batch["has_partner"]  # the others are there to be told apart from
        return (losses * paired).sum() / paired.sum().clamp(min=1)

    def _distil(self, found: _Compared) -> Tensor:
        return self._unlike_teacher(found.students, found.batch)

    def _distil_word(self, found: _Compared) -> Tensor:
        return self._unlike_teacher(found.word_students, found.batch)

    def _align(self, found: _Compared) -> Tensor:
        """The squared distance to the states of the first caption in units of their mean square, so 2 where nothing is
        alike; half of it is the words and the first end token, half the padding."""
        assert self.begun is not None
        batch, states, end_id = found.batch, found.hidden, self.tokenizer.end_id
        with torch.no_grad():
            first = self.begun.to(states.device)(batch["first_ids"])[3].float()
            places = same_places(batch["token_ids"], batch["first_ids"], end_id=end_id)
            first = first.gather(1, places[..., None].expand_as(first))
        squares = (states - first).square().sum(dim=2)
        squares = squares / first.square().sum(dim=2).mean(dim=1, keepdim=True)
        text = torch.arange(squares.shape[1], device=squares.device) <= first_end(batch["token_ids"], end_id)[:, None]
        parts = [(squares * part).sum(dim=1) / part.sum(dim=1).clamp(min=1) for part in (text, ~text)]
        return torch.stack(parts).mean()

    def _unlike_teacher(self, students: Tensor | None, batch: Batch) -> Tensor:
        assert students is not None
        teacher, text = batch["teacher"], batch["text"]
        nce = info_nce(students, teacher, alike=_equal(text, text), temperature=self.temperature).mean()
        return (1 - (students * teacher).sum(dim=1)).mean() + self.infonce_weight * nce

    @torch.no_grad()
    def validate(self, networks: Networks) -> dict[str, float]:
        """Over the held-out captions: the loss; perplexity per token; mean cosine to the teacher's vectors, and how
        often the caption's own one is the nearest; how often the nearest caption is an alternative."""
        if not len(self.held_out):
            return {}
        found = list(self._compared(networks, self.held_out))
        losses = sum(float(self._losses(part).loss) * len(part.batch["token_ids"]) for part in found)
        figures = {"loss": losses / len(self.held_out)}
        if "lm" in self.objectives:
            surprise = sum(float(part.surprise.double().sum()) for part in found)
            figures["perplexity"] = math.exp(min(surprise / float(self.items.lengths()[self.held_out].sum()), 100.0))
        if self.items.vectors is not None:
            students = torch.cat([part.students for part in found if part.students is not None]).cpu()
            teachers = self.items.vectors[torch.from_numpy(self.held_out)]
            figures["cosine"] = float((students * teachers).sum(dim=1).mean())
            figures["retrieval"] = _own_is_nearest(students, teachers, self.items.texts[self.held_out])
        if "contrastive" in self.objectives:
            states = F.normalize(torch.cat([part.states for part in found]).cpu(), dim=1)
            figures["alternative_retrieval"] = _nearest_is_alternative(states, self.items.groups[self.held_out])
        return figures

    @torch.no_grad()
    def _fit_projection(self, indices: np.ndarray) -> None:
        """Make the projection the ridge regression from the encoder's states to the teacher's vectors, over captions.

        They should be in the order of their lengths, so that little of a batch is padding.
        """
        found = list(self._compared(self.networks, indices))
        states = torch.cat([part.states for part in found]).double()
        wanted = torch.cat([part.batch["teacher"] for part in found]).double()
        squares = states.T @ states
        squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
        weight = torch.linalg.solve(squares, states.T @ wanted).T
        self.networks[PROJECTION].load_state_dict({"weight": weight.float()})

    def _compared(self, networks: Networks, indices: np.ndarray) -> Iterator[_Compared]:
        """What the networks make of captions with all their words, a batch at a time."""
        device = next(networks[ENCODER].parameters()).device
        for first in range(0, len(indices), VALIDATION_BATCH):
            yield self._compare(networks, self._fixed_batch(indices[first : first + VALIDATION_BATCH], first, device))

    def _fixed_batch(self, indices: np.ndarray, first: int, device: torch.device) -> Batch:
        """A batch that is the same at every validation, with all words."""
        items = [
            self.items.item(int(index), draw=rng.scalars(self.seed, place, "validation"), word_dropout=0.0)
            for place, index in enumerate(indices, start=first)
        ]
        return {name: tensor.to(device) for name, tensor in self.collate(items).items()}

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        """`text_encoder`, `text_encoder_ema` where there is one, `tokenizer`. A projection is no part of a model."""
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        write_text_encoder(folder / ENCODER, networks[ENCODER], networks[ENCODER].state_dict())
        if ENCODER in averages:
            write_text_encoder(folder / f"{ENCODER}_ema", averages[ENCODER], averages[ENCODER].state_dict())

    @torch.no_grad()
    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        """Some captions, held out where some are, and what the encoder finds nearest to each; as text."""
        asked = _spread(self.held_out if len(self.held_out) else self.trained, SHOWN)
        among = np.concatenate([_spread(self.trained, COMPARED), _spread(self.held_out, COMPARED)])
        among = among[np.unique(self.items.texts[among], return_index=True)[1]]
        states = self._states(networks, np.concatenate([asked, among]))
        likeness = states[: len(asked)] @ states[len(asked) :].T
        lines = []
        for row, index in zip(likeness, asked, strict=True):
            lines.append(self.captions.texts[index])
            others = row.masked_fill(torch.from_numpy(self.items.texts[among] == self.items.texts[index]), -math.inf)
            values, places = others.topk(min(NEAREST, len(among)))
            lines += [
                f"  {value:.3f}  {self.captions.texts[among[place]]}"
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
                if value > -math.inf
            ]
        path = folder / f"nearest-{step}.txt"
        write_whole(path, "\n".join([*lines, ""]).encode(), overwrite=True)
        return [path]

    def _states(self, networks: Networks, indices: np.ndarray) -> Tensor:
        """Unit states [n, D] of captions on the CPU, as the teacher's where there is one."""
        parts = [
            found.students if found.students is not None else F.normalize(found.states, dim=1)
            for found in self._compared(networks, indices)
        ]
        return torch.cat(parts).float().cpu()


@dataclass(frozen=True)
class _Compared:
    """What the networks make of a batch of B captions."""

    batch: Batch
    states: Tensor
    """[B, D], at the end token."""
    partners: Tensor
    """[B, D]; empty where partners are not compared."""
    surprise: Tensor
    """[B] nats a caption; empty where words are not predicted."""
    hidden: Tensor
    """All states of the captions, [B, L, D]."""
    students: Tensor | None
    """Unit [B, D of the teacher]."""
    word_students: Tensor | None
    """The same at the last words; empty where they are not compared."""


_TERMS: dict[Objective, Callable[[TextEncoderTask, _Compared], Tensor]] = {
    "lm": TextEncoderTask._lm,
    "contrastive": TextEncoderTask._contrastive,
    "distil": TextEncoderTask._distil,
    "distil-word": TextEncoderTask._distil_word,
    "align": TextEncoderTask._align,
}


def info_nce(rows: Tensor, columns: Tensor, *, alike: Tensor, temperature: float) -> Tensor:
    """InfoNCE per row [B], in both directions, of unit vectors [B, D] that belong together place by place.

    -log softmax(rows · columnsᵀ / temperature) on the diagonal (van den Oord et al. 2018; in both directions as CLIP's,
    Radford et al. 2021). A row and a column that are `alike` [B, B] are no negatives of each other.
    """
    own = torch.arange(len(rows), device=rows.device)
    others = alike & (own[:, None] != own)
    logits = (rows @ columns.T / temperature).masked_fill(others, -math.inf)
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def _equal(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] == columns[None]


def by_length(indices: np.ndarray, tokens: np.ndarray, *, fewest: int) -> dict[Size, np.ndarray]:
    """Buckets of captions that are cut to the same length, so that a step computes little padding.

    `tokens` [n] counts start and end. What would fill no batch of `fewest` goes to the next longer captions, the last
    of them to the next shorter ones.
    """
    lengths = -(-tokens // LENGTH_STEP) * LENGTH_STEP
    buckets: dict[Size, np.ndarray] = {}
    gathered = np.zeros(0, dtype=np.int64)
    for length in np.unique(lengths).tolist():
        gathered = np.concatenate([gathered, indices[lengths == length]])
        if len(gathered) >= fewest:
            buckets[length, 1] = np.sort(gathered)
            gathered = gathered[:0]
    if len(gathered):
        longest = next(reversed(buckets), (int(lengths.max()), 1))
        buckets[longest] = np.sort(np.concatenate([buckets.get(longest, gathered[:0]), gathered]))
    return buckets


def _hold_out(first: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which captions are held out, bool [n]: whole groups, so that no alternative of theirs is trained on."""
    count = len(first) - 1
    held = min(math.ceil(count * share), MOST_HELD_OUT, count - 1) if share > 0 else 0
    chosen = np.zeros(count, dtype=bool)
    chosen[rng.permutation(seed, 0, "held out", count)[:held]] = True
    return np.repeat(chosen, np.diff(first))


def _own_is_nearest(students: Tensor, teachers: Tensor, texts: np.ndarray) -> float:
    """Share of rows whose nearest teacher vector is that of their own text, among texts that occur once each."""
    once = torch.from_numpy(np.sort(np.unique(texts, return_index=True)[1]))
    nearest = (students[once] @ teachers[once].T).argmax(dim=1)
    return float((nearest == torch.arange(len(once))).double().mean())


def _nearest_is_alternative(states: Tensor, groups: np.ndarray) -> float:
    """Share of captions with alternatives among these whose nearest other caption is one; 0 where there are none."""
    numbers = torch.from_numpy(groups)
    nearest = (states @ states.T).fill_diagonal_(-math.inf).argmax(dim=1)
    paired = (numbers[:, None] == numbers[None]).sum(dim=1) > 1
    right = (numbers[nearest] == numbers) & paired
    return float(right.sum() / paired.sum().clamp(min=1))


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spaced."""
    return (
        indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(np.int64)]
        if len(indices)
        else indices
    )
