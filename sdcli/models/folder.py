"""The parts of a diffusers folder, each loaded on demand; and `PartLoader`, the type of every source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.io.json_files import read_json_object
from sdcli.io.weight_files import files_digest, shards
from sdcli.io.weights import fill, read_tensors
from sdcli.models.families.family import Family
from sdcli.models.layout import component_config, read_components
from sdcli.models.networks import build_empty, network_class, tokenizer_in


@dataclass(frozen=True)
class PartLoader:
    """How one kind of source makes the parts of a model."""

    parts: tuple[str, ...]
    """The networks there are."""
    network: Callable[[str], nn.Module]
    tokenizer: Callable[[str], Any]
    """The tokenizer of a text encoder."""
    identity: Callable[[str], str]
    scheduler_config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


def from_folder(folder: Path, family: Family, dtype: torch.dtype, *, variant: str | None = None) -> PartLoader:
    """Raises NotFound, UsageError and BadWeights for a folder that is incomplete."""
    _, components = read_components(folder)

    def config_of(part: str) -> dict[str, Any]:
        return {"_class_name": components[part].classes[0], **component_config(folder, components, part)}

    def files(part: str) -> list[Path]:
        stem = network_class(config_of(part), components[part], family).stem
        return shards(folder / components[part].folder, stem, variant=variant)

    def network(part: str) -> nn.Module:
        config = config_of(part)
        kind = network_class(config, components[part], family)
        empty = build_empty(kind, config, source=str(folder / components[part].folder))
        number, wanted = family.part_dtype(part, config, dtype), set(empty.state_dict())
        tensors: dict[str, Tensor] = {}
        for file in files(part):
            tensors |= read_tensors(file, number, rename=lambda stored: kind.present_name(stored, wanted))
        kind.complete(tensors)
        fill(empty, tensors, source=str(files(part)[0]))
        return kind.finish(empty)

    def tokenizer(part: str) -> Any:
        component = components[part.replace("text_encoder", "tokenizer")]
        return tokenizer_in(folder / component.folder, component)

    scheduler = read_json_object(folder / "scheduler" / "scheduler_config.json")
    return PartLoader(
        network_parts(components),
        network,
        tokenizer,
        identity=lambda part: files_digest(files(part)),
        scheduler_config=family.scheduler_config(scheduler),
        settings=read_json_object(folder / "model_index.json"),
    )


def network_parts(names: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that are networks: first the text encoders, then the denoiser and the VAE."""
    return tuple(sorted(name for name in names if not name.startswith("tokenizer")))
