"""Whether the files of a model are on this machine."""

from __future__ import annotations

from sdcli.errors import BadWeights
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.models.sources import EmbeddedSource, FileSource, FolderSource, HubSource, RandomSource

USABLE = frozenset({"embedded", "in memory", "on disk", "downloaded"})
"""What `presence` says of a model whose files are here."""


def presence(spec: ModelSpec | ControlNetSpec) -> str:
    """In a few words whether a model can be loaded on this machine; those in `USABLE` can."""
    match spec.source:
        case EmbeddedSource():
            return "embedded"
        case RandomSource():
            return "in memory"
        case FolderSource(path=path) | FileSource(path=path):
            return "on disk" if path.exists() else "missing"
        case HubSource() as source:
            from sdcli.models.hub.cache import snapshot_folder
            from sdcli.models.hub.repo_files import first_missing

            folder = snapshot_folder(source)
            if not folder.is_dir():
                return "not downloaded"
            try:
                return "downloaded" if first_missing(folder, spec) is None else "partly downloaded"
            except BadWeights:
                return "damaged"
