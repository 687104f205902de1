"""The user's own models file: entries added, removed and made the default, each write whole and checked before."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sdcli.errors import NotFound, UsageError
from sdcli.io.files import expanded, write_whole
from sdcli.io.pickles import PICKLE_SUFFIXES, pickle_refused
from sdcli.io.yaml_files import read_yaml
from sdcli.models.registry import (
    HUB_ID,
    ModelSpec,
    load_registry,
    packaged_registry_file,
    read_registry_file,
    spec_of_folder,
    user_registry_file,
)
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import did_you_mean, first_problem

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_HEADING = "# Your own models, laid over those of sdcli; `sdcli models add` and `remove` write this file.\n"


@dataclass(frozen=True)
class Written:
    """A models file that was written, and where the former one went if it held comments (they are lost)."""

    file: Path
    backup: Path | None


def add_model(name: str, entry: dict[str, Any], *, overwrite: bool) -> Written:
    """Write an entry, laid out as in models.yaml, to the user's file. Raises UsageError and CannotWrite."""
    if not _NAME.fullmatch(name) or Path(name).suffix.lower() in {".safetensors", *PICKLE_SUFFIXES}:
        raise UsageError(f"{name!r} cannot name a model: letters, digits, '.', '_' and '-', and no file's ending")
    checked_entry(name, entry)
    if name in load_registry().controlnets:
        raise UsageError(f"{name!r} is a ControlNet; take another name")
    data = _user_data()
    if name in _entries(packaged_registry_file()) and not overwrite:
        raise UsageError(f"{name!r} is a model of sdcli itself; --overwrite lays yours over it, or take another name")
    if name in data["models"] and not overwrite:
        raise UsageError(f"{name!r} is in {user_registry_file()} already; --overwrite replaces it")
    return _write({**data, "models": {**data["models"], name: entry}})


def remove_model(name: str) -> Written:
    """Take an entry out of the user's file. Raises NotFound, and UsageError for an entry of sdcli itself."""
    data = _user_data()
    entries = dict(data["models"])
    if entries.pop(name, None) is None:
        if name in _entries(packaged_registry_file()):
            raise UsageError(f"{name!r} is a model of sdcli itself and stays (--files deletes what was downloaded)")
        raise NotFound(f"no model {name!r} in {user_registry_file()}{did_you_mean(name, entries)}")
    data = {**data, "models": entries}
    if data.get("default") == name and name not in _entries(packaged_registry_file()):
        del data["default"]
    return _write(data)


def set_default(name: str) -> Written:
    """Make a model of sdcli's or the user's file the default of every command without -m.

    Raises NotFound for one that is in neither, and UsageError for a family that is not supported.
    """
    entries = {**_entries(packaged_registry_file()), **_own_entries()}
    if name not in entries:
        hint = did_you_mean(name, entries) or "; `sdcli models add` gives a model a name"
        raise NotFound(f"no model {name!r} in the models files{hint}")
    entries[name].require_supported()
    return _write({**_user_data(), "default": name})


def source_of(text: str, *, revision: str | None, variant: str | None) -> dict[str, Any]:
    """The `source` of an entry from what was typed: a diffusers folder, a .safetensors file or owner/name[@revision].

    Raises NotFound, and UsageError for a pickle or an option that has no effect.
    """
    path = expanded(text)
    if not path.exists() and HUB_ID.fullmatch(text) and path.suffix.lower() not in {".safetensors", *PICKLE_SUFFIXES}:
        repo, _, typed = text.partition("@")
        if typed and revision and typed != revision:
            raise UsageError(f"two revisions were given: {typed} and {revision}")
        chosen = {"revision": typed or revision, "variant": variant}
        return {"kind": "hub", "repo": repo} | {key: value for key, value in chosen.items() if value}
    if revision or variant:
        raise UsageError("--revision and --variant are for models of the hub, and this is a local one")
    if path.is_dir():
        return {"kind": "folder", "path": str(spec_of_folder(path).source.path)}  # type: ignore[union-attr]
    if not path.exists():
        raise NotFound(f"no file or folder {text}, and it is not the owner/name of a repository")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(pickle_refused(path))
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{text} is neither a diffusers folder nor a .safetensors file")
    return {"kind": "file", "path": str(path.resolve())}


def checked_entry(name: str, entry: dict[str, Any]) -> ModelSpec:
    """The spec that an entry means. Raises UsageError that names the field."""
    try:
        spec = ModelSpec.model_validate({"name": name, **entry})
    except ValidationError as error:
        raise UsageError(f"model {name}: {first_problem(error)}") from None
    if spec.defaults.scheduler not in SCHEDULERS:
        hint = did_you_mean(spec.defaults.scheduler, SCHEDULERS)
        raise UsageError(f"model {name}: defaults.scheduler: no scheduler {spec.defaults.scheduler!r}{hint}")
    return spec


def _entries(file: Path) -> dict[str, ModelSpec]:
    return read_registry_file(file)[1]


def _own_entries() -> dict[str, ModelSpec]:
    return _entries(user_registry_file()) if user_registry_file().exists() else {}


def _user_data() -> dict[str, Any]:
    """The user's file as plain data, checked as a registry; an empty one where there is none."""
    file = user_registry_file()
    if not file.exists():
        return {"schema": 1, "models": {}}
    read_registry_file(file)
    data = read_yaml(file)
    return {"schema": 1, **data, "models": data.get("models") or {}}


def _write(data: dict[str, Any]) -> Written:
    file = user_registry_file()
    former = file.read_text(encoding="utf-8") if file.exists() else ""
    backup = None
    if any("#" in line for line in former.removeprefix(_HEADING).splitlines()):
        backup = file.with_name(file.name + ".bak")
        write_whole(backup, former.encode(), overwrite=True)
    text = _HEADING + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    write_whole(file, text.encode(), overwrite=True)
    return Written(file, backup)
