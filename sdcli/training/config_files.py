"""Settings of training from a config file (TOML or YAML), from RUN/settings.yaml and from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

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
    of_file = {name: value for name, value in read.items() if name in kind.model_fields}
    return validated(kind, {**(recorded or {}), **of_file, **typed}, file=config, of_file=of_file.keys() - typed.keys())


def validated(kind: type[S], values: Mapping[str, Any], *, file: Path | None, of_file: Collection[str]) -> S:
    """The settings with these values, those named in `of_file` from the config file `file`.

    Raises UsageError with one sentence that names the setting, and the file where the value is from there.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        named = {str(part) for part in error.errors()[0]["loc"][:1]} or set(values)
        raise UsageError(f"{file}: {problem}" if file is not None and named <= set(of_file) else problem) from None


def read_config(file: Path, kind: type[TrainSettings]) -> dict[str, Any]:
    """Read settings from a TOML or YAML file, with keys in kebab-case or snake_case, and maybe `data` and `output`.

    Every name that a setting has on the command line is a key; a setting may stand there once.
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
    fields = {name: name for name in (*kind.model_fields, "data", "output", "command")}
    for name, info in kind.model_fields.items():
        extra: Any = info.json_schema_extra
        fields |= {flag.removeprefix("--").replace("-", "_"): name for flag in extra["also"]}
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UsageError(f"{file}: unknown setting {key!r}{did_you_mean(name, fields)}")
        field = fields[name]
        if field in values:
            raise UsageError(f"{file}: {spelled[field]!r} and {key!r} are the same setting; keep one of them")
        values[field], spelled[field] = _plain_value(value, kind.model_fields.get(field), f"{file}: {key}"), str(key)
    return values


def _plain_value(value: Any, info: FieldInfo | None, where: str) -> Any:
    """A value of a file as the command line would give it; `info` is None for a path. Raises UsageError."""
    if info is None:
        if isinstance(value, str) or value is None:
            return value
        raise UsageError(f"{where}: should be a text in quotes, not {value!r}")
    kinds = (info.annotation, *get_args(info.annotation))
    if isinstance(value, bool) and bool not in kinds:
        raise UsageError(
            f"{where}: should not be {str(value).lower()}; YAML reads words like no and on so, unless quoted"
        )
    if isinstance(value, int) and not isinstance(value, bool) and str in kinds:
        return str(value)  # resolution = 512
    return tuple(value) if isinstance(value, list) else value
