"""The layout of a diffusers folder, read without opening the weights: its parts, its family, its sizes.

model_index.json names a pipeline class, and each family of models/families/ lists the classes of its pipelines with
the parts of such a folder. Each folder has a scheduler as well.

Two files are sdcli's own, both optional: `classes.json`, a list of the classes' names in the order of their labels,
and `sdcli.json`, `{"schema": 1, "defaults": {...}}` with the fields that an entry's defaults have in models.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.json_files import read_json_list, read_json_object
from sdcli.models.families import DEFAULT_FAMILY, family_of, pipelines
from sdcli.models.families.family import Components, Configs, Family, ModelKind
from sdcli.vae.config import cell_of


@dataclass(frozen=True)
class ModelFolder:
    """The description of a folder by its small files."""

    path: Path
    family: Family
    components: Components
    """The parts that are there; without `unet` the folder only has parts for other models."""
    kind: ModelKind
    size: tuple[int, int] | None
    """The width and height it was trained on, in pixels; None if the folder does not state them."""
    defaults: Mapping[str, Any]
    """Of sdcli.json, not yet checked field by field."""

    @property
    def defaults_file(self) -> Path:
        return self.path / "sdcli.json"


def read_model_folder(path: Path, *, preferred: Family = DEFAULT_FAMILY) -> ModelFolder:
    """Read the small files of a diffusers folder; `preferred` is its family if several would do.

    Raises NotFound, UsageError and BadWeights, each with a sentence.
    """
    pipeline, components = read_components(path)
    vae = component_config(path, components, "vae") if "vae" in components else None
    defaults = _read_defaults(path / "sdcli.json")
    if "unet" not in components:
        family, cell = family_of(pipeline, {}, preferred=preferred), cell_of(vae) if vae is not None else 8
        kind = replace(family.kind, size_step=cell, cell=cell)
        return ModelFolder(path, family, components, kind, None, defaults)
    denoiser = component_config(path, components, "unet")
    family = family_of(pipeline, denoiser, preferred=preferred)
    classes = read_classes(path) if family.takes_prompt and not family.reads_text else None
    kind = family.describe(Configs(denoiser, vae, classes, str(path)))
    return ModelFolder(path, family, components, kind, _trained_size(denoiser, kind.cell), defaults)


def read_components(path: Path) -> tuple[str, Components]:
    """The pipeline class that model_index.json names, and its components that are there.

    They are of known classes and have their folders. Raises NotFound, UsageError and BadWeights.
    """
    if not path.is_dir():
        raise NotFound(f"no folder {path}")
    index = read_json_object(path / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in pipelines():
        raise UsageError(f"{path} is a {pipeline}; sdcli generates with {', '.join(pipelines())} so far")
    family = pipelines()[pipeline][0]
    components = dict(family.pipelines[pipeline])
    others = [name for name, one in components.items() if name != "unet" and _named(index, one.folder) is not None]
    if _named(index, components["unet"].folder) is None and others:
        # what `train-vae` and `train-text-encoder` make: parts to build a model with
        components = {name: one for name, one in components.items() if name in others}
    if all(name not in others for name in family.optional):
        components = {name: one for name, one in components.items() if name not in family.optional}
    for one in components.values():
        named = _named(index, one.folder)
        if named not in one.classes:
            raise BadWeights(
                f"{path}/model_index.json names {named!r} as its {one.folder}; known: {', '.join(sorted(one.classes))}"
            )
        if not (path / one.folder).is_dir():
            raise BadWeights(f"{path} has no {one.folder} folder; the model is incomplete")
    return pipeline, components


def _named(index: Mapping[str, Any], component: str) -> Any:
    """The class that model_index.json gives a component, [library, class]; None for an absent one, [null, null]."""
    named = index.get(component)
    return named[1] if isinstance(named, list) and len(named) == 2 else named


def component_config(path: Path, components: Components, part: str) -> dict[str, Any]:
    """The config.json of a part; its class is one that the component may have. Raises NotFound and BadWeights."""
    component = components[part]
    config = read_json_object(path / component.folder / "config.json")
    named = config.get("_class_name")
    if named is not None and named not in component.classes:
        known = ", ".join(component.classes)
        raise BadWeights(f"{path}/{component.folder}/config.json is of a {named!r}; known: {known}")
    return config


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in a folder's classes.json, or None where it has none. Raises BadWeights."""
    file = path / "classes.json"
    if not file.exists():
        return None
    names = read_json_list(file)
    for name in names:
        if not isinstance(name, str) or name != name.strip() or not name or len(name) > 1000 or not name.isprintable():
            raise BadWeights(f"{file}: {str(name)[:60]!r} cannot name a class")
    twice = next((name for name, after in zip(sorted(names), sorted(names)[1:], strict=False) if name == after), None)
    if twice is not None:
        raise BadWeights(f"{file}: the class {twice!r} is there twice")
    return tuple(names)


def _read_defaults(file: Path) -> dict[str, Any]:
    """The defaults in a folder's sdcli.json; none where it has no such file."""
    if not file.exists():
        return {}
    data = read_json_object(file)
    unknown = set(data) - {"schema", "defaults"}
    if unknown:
        raise UsageError(f"{file}: unknown key {min(unknown)!r}; it has schema and defaults")
    if data.get("schema") != 1 or type(data["schema"]) is not int:
        raise UsageError(f"{file}: schema: {data.get('schema')!r} is not 1, the only one this sdcli knows")
    defaults = data.get("defaults", {})
    if not isinstance(defaults, dict):
        raise UsageError(f"{file}: defaults: should be an object")
    return defaults


def _trained_size(denoiser: Mapping[str, Any], cell: int) -> tuple[int, int] | None:
    """Width and height in pixels of the images it was trained on; diffusers writes one side, or [height, width]."""
    stored = denoiser.get("sample_size")
    sides = [stored, stored] if type(stored) is int else stored
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int for side in sides):
        return None
    height, width = (side * cell for side in sides)
    return (width, height) if min(width, height) >= 8 and max(width, height) <= 8192 else None
