"""Settings of training from a config file (TOML or YAML), from RUN/settings.yaml and from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sdcli.errors import NotFound, UsageError
from sdcli.io.yaml_files import read_yaml
from sdcli.request.schema import did_you_mean, first_problem
from sdcli.training.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)


def settings_from(
    kind: type[S], typed: Mapping[str, Any], *, config: Path | None = None, recorded: Mapping[str, Any] | None = None
) -> S:
    """Merge settings: the command line over a config file over what a run recorded over the defaults.

    Raises NotFound and UsageError with one sentence that names the setting.
    """
    read = read_config(config, kind) if config is not None else {}
    values = {**(recorded or {}), **{name: read[name] for name in read if name in kind.model_fields}, **typed}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise UsageError(f"{config}: {problem}" if config is not None and not typed else problem) from None


def read_config(file: Path, kind: type[TrainSettings]) -> dict[str, Any]:
    """Read settings from a TOML or YAML file, with keys in kebab-case or snake_case, and maybe `data` and `output`.

    RUN/settings.yaml has `command` as well. Raises NotFound and UsageError.
    """
    if file.suffix.lower() == ".toml":
        try:
            data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise NotFound(f"no file {file}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file}: {error}") from None
    elif file.suffix.lower() in {".yaml", ".yml"}:
        data = read_yaml(file)
    else:
        raise UsageError(f"--config takes a .toml or .yaml file, not {file.name}")
    known = {*kind.model_fields, "data", "output", "command"}
    values = {}
    for name, value in data.items():
        field = str(name).replace("-", "_")
        if field not in known:
            raise UsageError(f"{file}: unknown setting {name!r}{did_you_mean(field, known)}")
        values[field] = tuple(value) if isinstance(value, list) else value
    return values
