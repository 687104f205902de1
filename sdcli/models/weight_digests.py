"""Which weights a model or a ControlNet has on the disk, as one digest. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sdcli.errors import BadWeights
from sdcli.io.digests import digest_of
from sdcli.io.weight_files import shards
from sdcli.models.hub.folders import folder_of
from sdcli.models.layout import read_components
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import FileSource, HubSource, RandomSource


def weights_digest(spec: ModelSpec | ControlNetSpec) -> str:
    """64 hex digits that are equal for equal weight files; for random weights, those of their recipe.

    Raises Offline for a model of the hub that is not here, NotFound and BadWeights.
    """
    if isinstance(spec.source, RandomSource):
        return _joined([spec.origin()])
    try:
        return _joined([digest_of(file) for file in _files(spec)])
    except OSError as error:
        raise BadWeights(f"cannot read the weights of {spec.name}: {error.strerror}") from None


def _files(spec: ModelSpec | ControlNetSpec) -> list[Path]:
    """The weight files that it is loaded from, in an order that depends on nothing else."""
    if isinstance(spec.source, FileSource):
        return [spec.source.path]
    folder = folder_of(spec)
    assert folder is not None  # None is a file or a recipe
    variant = spec.source.variant if isinstance(spec.source, HubSource) else None
    if isinstance(spec, ControlNetSpec):
        return shards(folder, "diffusion_pytorch_model", variant=variant)
    _, components = read_components(folder)
    return [
        file
        for part in sorted(components)
        if not part.startswith("tokenizer")
        for file in shards(
            folder / components[part].folder,
            "model" if part.startswith("text_encoder") else "diffusion_pytorch_model",
            variant=variant,
        )
    ]


def _joined(pieces: list[str]) -> str:
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()
