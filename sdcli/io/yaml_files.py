"""Small YAML files: model registries and settings, read as data alone and safe to open if they are hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sdcli.errors import NotFound, UsageError

MAX_YAML_BYTES = 256 * 1024


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (a few lines of them can mean gigabytes) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key_node.value!r} is there twice")
            seen.add(key_node.value if isinstance(key_node.value, str) else id(key_node))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """YAML text -> plain data, without aliases and duplicate keys. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(_sentence(error)) from None


def parse_own_yaml(text: str) -> Any:
    """YAML text of the package itself -> plain data: by libyaml where PyYAML has it, fifteen times as fast."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_yaml(file: Path, *, parse: Callable[[str], Any] = parse_yaml) -> dict[str, Any]:
    """A small YAML mapping, hostile input included. Raises NotFound and UsageError."""
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise UsageError(f"{file}: larger than {MAX_YAML_BYTES // 1024} KiB, the limit for such files")
        data = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no models file {file}") from None
    except OSError as error:
        raise NotFound(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{file}: should be a mapping, not a {type(data).__name__}")
    return data


def _sentence(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{f'line {mark.line + 1}: ' if mark else ''}{getattr(error, 'problem', None) or error}"
