"""The registry: read models.yaml and its overlays, find a model, and fill what a request leaves to the model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sdcli.errors import BadWeights, NotFound, UsageError
from sdcli.io.files import PACKAGE, expanded
from sdcli.io.pickles import PICKLE_SUFFIXES, pickle_refused
from sdcli.io.yaml_files import parse_own_yaml, parse_yaml, read_yaml
from sdcli.models.families import DEFAULT_FAMILY, FAMILIES, family_named, family_with_recipe, single_file_in
from sdcli.models.families.family import Family, ModelKind
from sdcli.models.fast_presets import FastPreset
from sdcli.models.hub.cache import snapshot_folder
from sdcli.models.layout import ModelFolder, read_model_folder
from sdcli.models.model_defaults import ModelDefaults, own_defaults, size_problem, usual_defaults
from sdcli.models.sources import EmbeddedSource, FileSource, FolderSource, HubSource, RandomSource, Source, Strict
from sdcli.request.schedulers import SCHEDULERS
from sdcli.request.schema import did_you_mean, first_problem

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


FamilyField = Annotated[Family, BeforeValidator(family_named)]


class ModelEntry(Strict):
    """One entry of models.yaml. The name is its key there."""

    name: str
    source: Source
    family: FamilyField = DEFAULT_FAMILY
    license: str = "unknown"
    description: str = ""
    download_bytes: int = Field(0, ge=0)
    defaults: ModelDefaults = ModelDefaults()
    fast: FastPreset | None = None
    """What `--fast` sets; None if there is no such preset for the model."""

    @model_validator(mode="after")
    def _preset_fits(self) -> Self:
        problem = None if self.fast is None else self.fast.problem_with(self.family)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if not isinstance(self.source, FolderSource):  # a folder describes the sizes it can generate
            for side in ("width", "height"):
                problem = size_problem(getattr(self.defaults, side), self.family.kind)
                if problem is not None:
                    raise ValueError(f"defaults.{side}: {problem}")
        return self


class ModelSpec(ModelEntry):
    """A model to generate with: an entry, completed by the small files of the model."""

    kind: ModelKind = ModelKind()

    def origin(self) -> str:
        """Where the weights come from, in a few words."""
        return _origin(self.source)

    def require_supported(self) -> None:
        """Raise UsageError for a family that sdcli cannot generate with yet; asked before anything is downloaded.

        Raises it, or BadWeights, for a file whose header shows that it is no model to generate with, too.
        """
        found = single_file_in(self.source.path) if isinstance(self.source, FileSource) else None
        if found is not None and found.problem is not None:
            raise found.problem
        if not self.family.supported:
            supported = sorted(name for name, family in FAMILIES.items() if family.supported)
            raise UsageError(
                f"model {self.name!r} is of the {self.family.name} family, which is not yet supported "
                f"(supported: {', '.join(supported)}); nothing was downloaded"
            )


class ControlNetSpec(Strict):
    """A ControlNet: an entry of models.yaml's `controlnets`, or what a path means."""

    name: str
    source: Annotated[FolderSource | FileSource | HubSource, Field(discriminator="kind")]
    family: FamilyField = DEFAULT_FAMILY
    license: str = "unknown"
    description: str = ""
    download_bytes: int = Field(0, ge=0)

    def origin(self) -> str:
        """Where the weights come from, in a few words."""
        return _origin(self.source)


def _origin(source: Source) -> str:
    match source:
        case EmbeddedSource():
            return "embedded in sdcli"
        case RandomSource(architecture=architecture, seed=seed):
            return f"random weights ({architecture}, seed {seed})"
        case FolderSource(path=path) | FileSource(path=path):
            return str(path)
        case HubSource(repo=repo, revision=revision):
            return repo if revision == "main" else f"{repo}@{revision}"


class Registry(Strict):
    """All known models. `files` are the files that were read, the later overlaying the earlier."""

    default: str
    models: dict[str, ModelSpec]
    controlnets: dict[str, ControlNetSpec] = Field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def find(self, model: str | None) -> ModelSpec:
        """The spec of a registry name, a folder, a .safetensors file or owner/name[@revision]; None is the default.

        Nothing is downloaded, and no weights are opened; a folder's small files are read. Raises NotFound, UsageError
        for a pickle or a folder of an unknown kind, and BadWeights for a damaged one.
        """
        name = self.default if model is None else model
        if name in self.models:
            return described(self.models[name])
        path = expanded(name)
        looks_like_path = (
            path.is_absolute() or name.startswith((".", "~")) or path.suffix in {".safetensors", *PICKLE_SUFFIXES}
        )
        if os.path.isdir(path):  # unlike Path's methods it is content with any name
            return _renamed(spec_of_folder(path), self.models)
        if path.suffix.lower() in PICKLE_SUFFIXES:
            if os.path.exists(path):
                raise UsageError(pickle_refused(path))
            raise NotFound(f"no file {name}")
        if os.path.isfile(path):
            spec = ModelSpec(name=str(path), source=FileSource(kind="file", path=path.resolve()))
            return _renamed(described(spec), self.models)
        if looks_like_path:
            raise NotFound(f"no file or folder {name}")
        if HUB_ID.fullmatch(name):
            return self._hub_spec(name)
        raise NotFound(f"no model {name!r} in {self._where()}{did_you_mean(name, self.models)} (sdcli models list)")

    def find_controlnet(self, name: str) -> ControlNetSpec:
        """The ControlNet of a registry name, a folder as diffusers writes it (or one that holds it as `controlnet`), a
        .safetensors file or owner/name[@revision]. Nothing is opened. Raises NotFound, and UsageError for a pickle.
        """
        if name in self.controlnets:
            return self.controlnets[name]
        path = expanded(name)
        if os.path.isdir(path):
            folder = path if (path / "config.json").is_file() else path / "controlnet"
            if not (folder / "config.json").is_file():
                raise NotFound(
                    f"{name} is not a ControlNet: it has no config.json (expected beside it: its safetensors)"
                )
            return ControlNetSpec(name=name, source=FolderSource(kind="folder", path=folder.resolve()))
        if path.suffix.lower() in PICKLE_SUFFIXES and os.path.exists(path):
            raise UsageError(pickle_refused(path))
        if os.path.isfile(path):
            return ControlNetSpec(name=name, source=FileSource(kind="file", path=path.resolve()))
        if HUB_ID.fullmatch(name) and path.suffix.lower() not in {".safetensors", *PICKLE_SUFFIXES}:
            repo, _, revision = name.partition("@")
            source = HubSource(kind="hub", repo=repo, revision=revision or "main")
            return ControlNetSpec(name=name, source=source)
        hint = did_you_mean(name, self.controlnets)
        raise NotFound(
            f"no ControlNet {name!r}: no such file or folder, and none of that name in {self._where()}{hint}"
        )

    def find_either(self, name: str) -> ModelSpec | ControlNetSpec:
        """A model, or the ControlNet of that name in the files. Raises what `find` raises."""
        if name in self.controlnets and name not in self.models:
            return self.controlnets[name]
        return self.find(name)

    def _hub_spec(self, name: str) -> ModelSpec:
        repo, _, revision = name.partition("@")
        known = next(
            (spec for spec in self.models.values() if isinstance(spec.source, HubSource) and spec.source.repo == repo),
            None,
        )
        if known is not None and isinstance(known.source, HubSource):
            source = known.source.model_copy(update={"revision": revision or known.source.revision})
            return described(known.model_copy(update={"name": name, "source": source}))
        return described(ModelSpec(name=name, source=HubSource(kind="hub", repo=repo, revision=revision or "main")))

    def _where(self) -> str:
        return self.files[-1].name if self.files else "models.yaml"


def load_registry(models_file: Path | None = None) -> Registry:
    """The packaged models.yaml, overlaid by the user's file and then by `models_file` (or $SDCLI_MODELS_FILE).

    Raises NotFound, or UsageError with one sentence that names file, entry and field.
    """
    files = [packaged_registry_file()]
    if user_registry_file().exists():
        files.append(user_registry_file())
    extra = models_file or (Path(os.environ["SDCLI_MODELS_FILE"]) if os.environ.get("SDCLI_MODELS_FILE") else None)
    if extra is not None:
        files.append(extra)
    default, named_by, models, controlnets = None, files[0], {}, {}
    for file in files:
        read = _packaged_registry(file, *_state(file)) if file is files[0] else read_registry_file(file)
        models.update(read.models)
        controlnets.update(read.controlnets)
        if read.default is not None:
            default, named_by = read.default, file
    if default is None:
        raise UsageError(f"{files[0]}: default: missing")
    if default not in models:
        raise UsageError(f"{named_by}: default: no model {default!r}{did_you_mean(default, models)}")
    return Registry.model_construct(default=default, models=models, controlnets=controlnets, files=tuple(files))


class RegistryFile(NamedTuple):
    """The content of one registry file; entries by name."""

    default: str | None
    models: dict[str, ModelSpec]
    controlnets: dict[str, ControlNetSpec]


@lru_cache(maxsize=1)
def _packaged_registry(file: Path, *state: int) -> RegistryFile:
    """The content of models.yaml as shipped, in this state of the file."""
    return read_registry_file(file, parse=parse_own_yaml)


def _state(file: Path) -> tuple[int, ...]:
    """Numbers that change with a file."""
    try:
        found = file.stat()
    except OSError:  # reading it says what is wrong
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_registry_file(file: Path, *, parse: Callable[[str], Any] = parse_yaml) -> RegistryFile:
    """Read and check one registry file. Raises NotFound and UsageError."""
    data = read_yaml(file, parse=parse)
    unknown = set(data) - {"schema", "default", "models", "controlnets"}
    if unknown:
        raise UsageError(
            f"{file}: unknown key {min(unknown)!r}; a registry has schema, default, models and controlnets"
        )
    if data.get("schema", 1) != 1:
        raise UsageError(f"{file}: schema: {data['schema']!r} is not 1, the only one this sdcli knows")
    default = data.get("default")
    if default is not None and not isinstance(default, str):
        raise UsageError(f"{file}: default: should be the name of a model")
    return RegistryFile(
        default,
        {name: _spec(file, name, entry) for name, entry in _entries(file, data, "models")},
        {name: _controlnet_spec(file, name, entry) for name, entry in _entries(file, data, "controlnets")},
    )


def _entries(file: Path, data: dict[str, Any], section: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = data.get(section) or {}
    if not isinstance(entries, dict):
        raise UsageError(f"{file}: {section}: should be a mapping of names to entries")
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise UsageError(f"{file}: {section}.{name}: should be a mapping")
        yield str(name), entry


def _controlnet_spec(file: Path, name: str, entry: dict[str, Any]) -> ControlNetSpec:
    try:
        spec = ControlNetSpec.model_validate({"name": name, **entry})
    except ValidationError as error:
        raise UsageError(f"{file}: controlnets.{name}.{first_problem(error)}") from None
    return spec.model_copy(update={"source": _beside(file, spec.source)})


def _spec(file: Path, name: str, entry: dict[str, Any]) -> ModelSpec:
    try:
        checked = ModelEntry.model_validate({"name": name, **entry})
    except ValidationError as error:
        raise UsageError(f"{file}: models.{name}.{first_problem(error)}") from None
    spec = ModelSpec.model_construct(**dict(checked))  # checked; a schema of its class is built where there is need
    if spec.defaults.scheduler not in SCHEDULERS:
        hint = did_you_mean(spec.defaults.scheduler, SCHEDULERS)
        raise UsageError(f"{file}: models.{name}.defaults.scheduler: no scheduler {spec.defaults.scheduler!r}{hint}")
    fast = spec.fast and spec.fast.with_source(lambda source: _beside(file, source))
    return _of_family(spec.model_copy(update={"source": _beside(file, spec.source), "fast": fast}))


def _beside(file: Path, source: Any) -> Any:
    """A source whose path, if it has one, counts from the file's folder."""
    if not isinstance(source, FolderSource | FileSource):
        return source
    return source.model_copy(update={"path": (file.parent / expanded(source.path)).absolute()})


def packaged_registry_file() -> Path:
    """models.yaml as shipped: inside an installed wheel, or at the top of a checkout."""
    inside = PACKAGE / "models.yaml"
    return inside if inside.exists() else PACKAGE.parent / "models.yaml"


def user_registry_file() -> Path:
    """The user's own overlay, `models.yaml` in the configuration folder (XDG_CONFIG_HOME on Linux)."""
    return platformdirs.user_config_path("sdcli") / "models.yaml"


def _renamed(spec: ModelSpec, taken: Container[str]) -> ModelSpec:
    """The spec of a path under a name that is found again as that path: `./tiny`, where there is a model `tiny`."""
    return spec.model_copy(update={"name": f"./{spec.name}"}) if spec.name in taken else spec


def spec_of_folder(path: Path) -> ModelSpec:
    """A spec for a diffusers folder on disk. Raises NotFound where it is none, UsageError and BadWeights."""
    if not (path / "model_index.json").is_file():
        raise NotFound(
            f"{path} is not a diffusers model: it has no model_index.json "
            "(expected beside it: unet/, vae/, text_encoder/, tokenizer/, scheduler/)"
        )
    return described(ModelSpec(name=str(path), source=FolderSource(kind="folder", path=path.resolve())))


def described(spec: ModelSpec) -> ModelSpec:
    """The spec completed by the small files of its folder, or the header of its file: kind, family, and open defaults.

    Another source, or one that is missing or damaged (loading reports that), leaves the spec as it is; so does a
    repository of the hub that is not in the cache. Raises NotFound, UsageError and BadWeights.
    """
    if isinstance(spec.source, RandomSource):
        return spec.model_copy(update={"family": family_with_recipe(spec.source.architecture)})
    if isinstance(spec.source, FileSource):
        found = single_file_in(spec.source.path)
        if found is None:
            return spec.model_copy(update={"kind": spec.family.kind, "defaults": _over(spec, {})})
        defaults = _over(spec, found.layout.defaults)
        return spec.model_copy(update={"family": found.family, "kind": found.kind(), "defaults": defaults})
    try:
        folder = _folder_described(spec.source, spec.family)
    except (BadWeights, NotFound, UsageError):
        if not isinstance(spec.source, HubSource):
            raise
        folder = None  # `models pull` mends what the cache has
    if folder is None:
        return _of_family(spec)
    defaults = _over(spec, {**usual_defaults(folder), **own_defaults(folder)})
    return spec.model_copy(update={"kind": folder.kind, "family": folder.family, "defaults": defaults})


def _folder_described(source: Source, family: Family) -> ModelFolder | None:
    """The description of a diffusers folder, also of the embedded one or one in the hub's cache.

    Raises what reading it raises.
    """
    match source:
        case FolderSource(path=path):
            pass
        case EmbeddedSource(folder=name):
            path = PACKAGE / name
        case HubSource():
            path = snapshot_folder(source)
        case _:
            return None
    return read_model_folder(path, preferred=family) if (path / "model_index.json").is_file() else None


def _of_family(spec: ModelSpec) -> ModelSpec:
    """The spec with the kind and defaults of its family, for a model of the hub that is not on this machine."""
    if not isinstance(spec.source, HubSource):
        return spec
    return spec.model_copy(update={"kind": spec.family.kind, "defaults": _over(spec, spec.family.defaults)})


def _over(spec: ModelSpec, defaults: Mapping[str, Any]) -> ModelDefaults:
    """The defaults of an entry; fields that it leaves open are taken from the others."""
    return ModelDefaults(**{**defaults, **spec.defaults.model_dump(exclude_unset=True)})
