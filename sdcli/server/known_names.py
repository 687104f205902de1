"""Names in remote requests: of models, refiners, ControlNets and LoRAs that the operator has given names to.

On the command line such a name may be a file or a folder, too, of the working directory for instance; over the network
it never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sdcli.errors import NotFound
from sdcli.models.adapter_files import is_in_folder
from sdcli.models.registry import Registry
from sdcli.request.fields import LoraRef
from sdcli.request.schema import did_you_mean
from sdcli.server.settings import ServerSettings


def default_model(registry: Registry, settings: ServerSettings) -> str:
    """The model of a request that names none: the first that was loaded at the start, or the registry's default."""
    return settings.preload[0] if settings.preload else registry.default


def is_known_model(name: Any, registry: Registry, settings: ServerSettings) -> bool:
    """Whether a value is the name of a model that requests may use."""
    return isinstance(name, str) and (name in registry.models or name in settings.preload)


def check_known(fields: Mapping[str, Any], registry: Registry, settings: ServerSettings) -> None:
    """Raise NotFound for a name in the fields of a request that the operator has not given. Opens no file."""
    for field in ("model", "refiner"):
        name = fields.get(field)
        if name is not None and not is_known_model(name, registry, settings):
            raise NotFound(f"{field}: there is no model {name!r} here{did_you_mean(name, registry.models)}")
    for control in fields.get("controls") or ():
        if control["model"] not in registry.controlnets:
            raise NotFound(f"controls: there is no ControlNet {control['model']!r} here")
    for entry in fields.get("loras") or ():
        try:
            ref = LoraRef.model_validate(entry)
        except ValidationError:
            continue  # reported with all other fields
        if not is_in_folder(ref, settings.run.lora_dir):
            raise NotFound(f"loras: there is no LoRA {ref.path!r} here")
