"""The models of a server as its clients see them: by the names that the operator gave them, never by a path."""

from __future__ import annotations

from sdcli.models.presence import USABLE, presence
from sdcli.models.registry import Registry
from sdcli.request.schema import did_you_mean
from sdcli.server.native import ApiError
from sdcli.server.settings import ServerSettings


def models_here(registry: Registry, settings: ServerSettings) -> list[str]:
    """The models whose files are on this machine, those that were loaded at the start first, then the default."""
    here = [name for name, spec in registry.models.items() if spec.family.supported and presence(spec) in USABLE]
    first = [*settings.preload, registry.default]
    return list(dict.fromkeys([*(name for name in first if name in here or name in settings.preload), *here]))


def check_model(name: str, registry: Registry, settings: ServerSettings, *, param: str = "model") -> str:
    """The name of a known model. Raises ApiError: 404 for any other text, whatever it may mean on the disk."""
    if name in registry.models:
        return name
    hint = did_you_mean(name, registry.models)
    raise ApiError(404, "model_not_found", f"there is no model {name[:100]!r} here{hint}", param=param)
