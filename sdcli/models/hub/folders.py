"""The folder that a model is loaded from: the package's, the user's, or a whole snapshot in the hub cache."""

from __future__ import annotations

from pathlib import Path

from sdcli.errors import Offline
from sdcli.io.files import PACKAGE, megabytes
from sdcli.models.hub.cache import cache_folder, snapshot_folder
from sdcli.models.hub.repo_files import first_missing
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import EmbeddedSource, FolderSource, HubSource


def folder_of(spec: ModelSpec | ControlNetSpec) -> Path | None:
    """The folder that a model or ControlNet is loaded from; None for a single file and random weights.

    Never touches the network. Raises Offline, with the command that downloads it, where a hub's is not wholly here.
    """
    match spec.source:
        case EmbeddedSource(folder=name):
            return PACKAGE / name
        case FolderSource(path=path):
            return path
        case HubSource() as source:
            return whole_snapshot(spec, source)
    return None


def tokenizer_folder(spec: ModelSpec) -> Path:
    """Where a text model's tokenizer is. Raises Offline for a hub model that is not in the cache."""
    folder = folder_of(spec)
    return folder / "tokenizer" if folder is not None else PACKAGE / "encoders/clip_tokenizer"


def whole_snapshot(spec: ModelSpec | ControlNetSpec, source: HubSource) -> Path:
    folder = snapshot_folder(source)
    what = f"{'model' if isinstance(spec, ModelSpec) else 'ControlNet'} {spec.name!r}"
    size = f" ({megabytes(spec.download_bytes)})" if spec.download_bytes else ""
    advice = f"run `sdcli models pull {spec.name}`{size}"
    if not folder.is_dir():
        raise Offline(f"{what} is not in the cache {cache_folder()}; {advice}")
    missing = first_missing(folder, spec)
    if missing:
        raise Offline(f"{what} is only partly in the cache: {missing} is missing; {advice}")
    return folder
