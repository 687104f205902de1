"""Random weights made in memory from a seed: for smoke tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sdcli.encoders.tokenizer import ClipTokenizer, load_tokenizer
from sdcli.io.files import PACKAGE
from sdcli.io.weights import fill, random_tensors
from sdcli.models.families.family import Family
from sdcli.models.folder import PartLoader, network_parts
from sdcli.models.networks import build_empty, network_class
from sdcli.models.sources import RandomSource


def from_recipe(source: RandomSource, family: Family, dtype: torch.dtype) -> PartLoader:
    """The parts of a family's recipe."""
    configs = family.recipes[source.architecture]()
    _, components = family.components()

    def network(part: str) -> nn.Module:
        kind = network_class(configs[part], components[part], family)
        empty = build_empty(kind, configs[part], source=f"random-{source.architecture}")
        number = family.part_dtype(part, configs[part], dtype)
        fill(empty, random_tensors(empty, number, seed=source.seed), source=source.architecture)
        return kind.finish(empty)

    return PartLoader(
        network_parts({part: config for part, config in configs.items() if part in components}),
        network,
        tokenizer=lambda part: shipped_tokenizer(family, part),
        identity=lambda part: f"random:{source.architecture}:{source.seed}",
        scheduler_config=configs["scheduler"],
    )


def shipped_tokenizer(family: Family, part: str) -> ClipTokenizer:
    """CLIP's own; OpenCLIP's text encoders have the same one, but pad with number 0."""
    tokenizer = load_tokenizer(PACKAGE / "encoders/clip_tokenizer")
    return replace(tokenizer, pad_id=0) if part in family.open_clip else tokenizer
