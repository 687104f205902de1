"""A folder whose weights are pickles (also in shards with an index) to the same folder with safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdcli.errors import BadWeights, CannotWrite, NotFound, UsageError
from sdcli.io.files import whole_file, write_whole
from sdcli.io.json_files import read_json_object
from sdcli.io.pickles import PICKLE_SUFFIXES
from sdcli.io.weight_files import MAX_HEADER_BYTES
from sdcli.models.convert import DEFAULT_TIMEOUT_S, Converted, convert

_INDEX = re.compile(r"(?P<stem>.+)\.bin\.index(?P<variant>\.[\w-]+)?\.json")
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|random_states|training_args|rng_state)[\w-]*\.(bin|pt|pth|pkl)")
"""Pickles that trainers leave beside the weights."""


def convert_folder(
    source: Path,
    target: Path,
    *,
    overwrite: bool,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    memory_gb: float | None = None,
    report: Callable[[Converted], None] = lambda done: None,
) -> list[Converted]:
    """Convert every pickled weight file in a folder and below, by the names that safetensors have in such folders.

    An index of shards is written anew, by the new names. `target` may be the folder itself; otherwise it gets a copy of
    all other files, too. Raises NotFound, UsageError, BadWeights and CannotWrite; files that are done stay.
    """
    if not source.is_dir():
        raise NotFound(f"no folder {source}")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; {source} is a folder, and becomes one")
    files = sorted(path for path in source.rglob("*") if path.is_file() and not _hidden(path.relative_to(source)))
    pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES and not _NOT_WEIGHTS.fullmatch(path.name)]
    if not pickles:
        raise UsageError(f"{source} holds no pickled weights (.bin, .ckpt, .pt, .pth)")
    in_place = source.resolve() == target.resolve()
    if in_place and not overwrite:  # a folder may have some of its weights in both formats
        pickles = [path for path in pickles if not path.with_name(present_name(path.name)).exists()]
    indices = [path for path in files if _INDEX.fullmatch(path.name)]
    renamed = {index: _renamed_index(index) for index in indices}  # before gigabytes are read
    if not in_place:
        for file in (path for path in files if path not in pickles and path not in indices):
            _copy(file, target / file.relative_to(source), overwrite=overwrite)
    done = []
    for file in pickles:
        place = target / file.relative_to(source)
        done.append(
            convert(
                file,
                place.with_name(present_name(file.name)),
                overwrite=overwrite,
                timeout_s=timeout_s,
                memory_gb=memory_gb,
            )
        )
        report(done[-1])
    for index, content in renamed.items():
        place = target / index.relative_to(source).with_name(_index_name(index.name))
        if not (in_place and place.exists() and not overwrite):
            write_whole(place, json.dumps(content, indent=2).encode(), overwrite=overwrite)
    return done


def present_name(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`, as transformers names its safetensors;
    diffusers keeps its names."""
    stem = name.rpartition(".")[0]
    return f"{re.sub(r'^pytorch_model(?=$|[.-])', 'model', stem)}.safetensors"


def _index_name(name: str) -> str:
    match = _INDEX.fullmatch(name)
    assert match is not None
    return f"{present_name(match['stem'] + '.bin')}.index{match['variant'] or ''}.json"


def _renamed_index(index: Path) -> dict[str, Any]:
    """The content of an index by the new names. Raises BadWeights."""
    content = read_json_object(index, max_bytes=MAX_HEADER_BYTES)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadWeights(f"{index} is not an index of weight files: it has no weight_map")
    return {**content, "weight_map": {tensor: present_name(name) for tensor, name in names.items()}}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _copy(file: Path, place: Path, *, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        raise CannotWrite(f"{place} exists already; --overwrite replaces it")
    with whole_file(place, overwrite=overwrite) as temporary:
        shutil.copyfile(file, temporary)
