"""The facts of models that `sdcli models list` and `show` print, and their lines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdcli.models.presence import presence
from sdcli.models.registry import ControlNetSpec, ModelSpec, Registry
from sdcli.models.sources import FileSource, HubFile, HubSource


def summary(spec: ModelSpec | ControlNetSpec, registry: Registry) -> dict[str, Any]:
    """The facts in a row of the list, JSON-ready."""
    return {
        "name": spec.name,
        "default": isinstance(spec, ModelSpec) and spec.name == registry.default,
        "family": spec.family.name,
        "supported": spec.family.supported,
        "here": presence(spec),
        "origin": spec.origin(),
        "download_bytes": spec.download_bytes,
        "license": spec.license,
        "description": spec.description,
        "fast": spec.fast.name if isinstance(spec, ModelSpec) and spec.fast is not None else None,
    }


def local_path(spec: ModelSpec | ControlNetSpec) -> Path | None:
    """Where a model's files are, or None for one without files. Raises Offline for one that is not downloaded."""
    from sdcli.models.hub.folders import folder_of

    return spec.source.path if isinstance(spec.source, FileSource) else folder_of(spec)


def files_of(spec: ModelSpec | ControlNetSpec) -> Iterator[tuple[str, int]]:
    """The model's files that are here, relative to its folder, with their bytes."""
    if isinstance(spec.source, HubSource):
        from sdcli.models.hub.cache import snapshot_folder

        root: Path | None = snapshot_folder(spec.source)
    else:
        root = local_path(spec)
    if root is None:
        return
    if root.is_file():
        yield root.name, root.stat().st_size
    for file in sorted(root.rglob("*")) if root.is_dir() else ():
        if file.is_file():
            yield file.relative_to(root).as_posix(), file.stat().st_size


def lora_of(spec: ModelSpec) -> dict[str, Any]:
    """The facts of a file that is a LoRA, which people keep in the same folders as models."""
    if not isinstance(spec.source, FileSource) or not spec.source.path.is_file():
        return {}
    from sdcli.models.lora import lora_facts

    facts = lora_facts(spec.source.path)
    return {"lora": facts} if facts is not None else {}


def preset_of(spec: ModelSpec) -> dict[str, Any]:
    """What `--fast` sets, and whether its LoRA is on this machine."""
    from sdcli.models.hub.cache import cached_file

    preset = spec.fast
    if preset is None:
        return {}
    facts: dict[str, Any] = {"name": preset.name, **preset.fields(), "most_steps": preset.most_steps}
    if preset.lora is not None:
        source = preset.lora.source
        path = cached_file(source) if isinstance(source, HubFile) else source.path
        facts |= {"lora": str(preset.lora.ref), "lora_here": "yes" if path.is_file() else "no"}
    return {"fast": {**facts, "license": preset.license}}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the list, as texts."""
    from sdcli.io.files import megabytes

    return (
        f"{'*' if row['default'] else ' '} {row['name']}",
        row["family"] if row["supported"] else f"({row['family']})",
        row["here"],
        megabytes(row["download_bytes"]) if row["download_bytes"] else "-",
        row["license"].partition(" (")[0],
        row["description"] + (f" [--fast: {row['fast']}]" if row["fast"] else ""),
    )


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Aligned columns; on a terminal cut to its width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        line = "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        yield line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def lines(fields: dict[str, Any]) -> Iterator[str]:
    """The facts of one model, for people."""
    for key, value in fields.items():
        if key == "files":
            yield f"files: {'' if value else 'none'}".rstrip()
            for file in value:
                yield f"  {file['bytes']:>13,}  {file['file']}"
        elif isinstance(value, dict):
            yield f"{key}: {', '.join(f'{inner}={shown}' for inner, shown in value.items() if shown is not None)}"
        else:
            yield f"{key}: { {True: 'yes', False: 'no', None: 'none'}.get(value, value) }"
