"""The files of wildcards: `__sea/fish__` -> the weighted lines of sea/fish.txt, or of a list in a YAML or JSON file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from sdcli.errors import NotFound, UsageError
from sdcli.io.json_files import parse_json
from sdcli.io.text import NotText, decode_text
from sdcli.io.yaml_files import parse_yaml
from sdcli.request.dynamic_syntax import Template, weighted_line
from sdcli.request.schema import did_you_mean

MAX_FILE_BYTES = 16 * 2**20
MAX_FILES = 20_000
"""Files of a folder that are looked at."""
_STRUCTURED = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Lines:
    """What a wildcard may become."""

    templates: tuple[Template, ...]
    weights: tuple[float, ...]

    @property
    def equal(self) -> bool:
        """Whether all are chosen equally often."""
        return len(set(self.weights)) == 1


@dataclass(frozen=True)
class WildcardFolder:
    """A folder of wildcards, its sub-folders included. Files are read when they are needed, and once."""

    path: Path
    _read: dict[str, Lines] = field(default_factory=dict, compare=False, repr=False)
    _found: list[_Contents] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise NotFound(f"no folder {self.path} of wildcards")

    def lines(self, name: str) -> Lines:
        """The lines of `sea/fish`, of all files that `colours*` or `**/fish` match, or of any `.../fish` where there is
        no other. Raises UsageError."""
        if name not in self._read:
            self._read[name] = self._lines(re.sub(r"[\\/]+", "/", name))
        return self._read[name]

    def _lines(self, name: str) -> Lines:
        folder = self.path.resolve()
        path = Path(os.path.normpath(folder / f"{name}.txt"))
        if not path.resolve().is_relative_to(folder):
            raise UsageError(f"the wildcard __{name}__ leaves the folder {self.path}")
        if path.is_file():
            return self._of_name(name, path)
        index = self._index
        names = {*index.texts, *index.lists}
        pattern = name.strip("/")
        if index.damaged and re.search(r"[*?\[]", pattern):
            raise UsageError(f"__{name}__: {index.damaged[0]}")
        matches = [one for one in names if fnmatchcase(one, pattern)] if name not in index.lists else [name]
        if not matches:
            matches = [one for one in names if fnmatchcase(f"/{one}", f"*/{pattern.removeprefix('**/')}")]
        if not matches:
            raise UsageError(self._missing(name, names))
        several = [self._of_name(one) for one in sorted(matches)]
        return Lines(
            tuple(template for lines in several for template in lines.templates),
            tuple(weight for lines in several for weight in lines.weights),
        )

    def _of_name(self, name: str, path: Path | None = None) -> Lines:
        path, lists = path or self._index.texts.get(name), self._index.lists.get(name, [])
        files = [*([path] if path is not None else []), *(one.file for one in lists)]
        if len(files) > 1:
            raise UsageError(f"the wildcard __{name}__ is in {files[0]} and in {files[1]}; rename one")
        return _of_list(lists[0]) if path is None else _of_text(path)

    def _missing(self, name: str, names: Iterable[str]) -> str:
        index = self._index
        stem = name.rpartition("/")[2]
        if re.search(r"[*?\[]", name):
            return f"no wildcard in {self.path} matches {name}{did_you_mean(name, names)}"
        if index.damaged:
            return f"no {name}.txt in {self.path}, and {index.damaged[0]}"
        other = next((path for path in index.others if path.stem == stem), None)
        if other is not None:
            return f"no {name}.txt in {self.path}; {other.name} is there, but wildcards are .txt, .yaml or .json files"
        return f"no {name}.txt in {self.path}{did_you_mean(name, names)}"

    @property
    def _index(self) -> _Contents:
        if not self._found:
            self._found.append(_indexed(self.path.resolve()))
        return self._found[0]


@dataclass(frozen=True)
class _List:
    """The value of a key in a YAML or JSON file, as it was read."""

    file: Path
    value: Any


@dataclass(frozen=True)
class _Contents:
    """What the folder holds, by the names of wildcards."""

    texts: dict[str, Path] = field(default_factory=dict)
    lists: dict[str, list[_List]] = field(default_factory=dict)
    """One alone, unless several files have it."""
    damaged: list[str] = field(default_factory=list)
    """Why files could not be read."""
    others: list[Path] = field(default_factory=list)
    """Files of other kinds."""


def _indexed(folder: Path) -> _Contents:
    index = _Contents()
    for path in islice(_files(folder), MAX_FILES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix == ".txt":
            index.texts[name] = path
        elif path.suffix in _STRUCTURED:
            try:
                for own, value in list(_lists(path, prefix=name.rpartition("/")[0])):
                    index.lists.setdefault(own, []).append(value)
            except UsageError as error:
                index.damaged.append(str(error))
        else:
            index.others.append(path)
    return index


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file() and path.resolve().is_relative_to(folder):
                yield path


def _lists(path: Path, *, prefix: str) -> Iterator[tuple[str, _List]]:
    """The names and lists of a YAML or JSON file; a list that is the whole file has the file's name."""
    text = _text(path)
    try:
        data = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    top = [prefix] if prefix else []
    if isinstance(data, Mapping):
        waiting: list[tuple[list[str], Any]] = [([*top, str(key)], value) for key, value in data.items()]
        while waiting:
            names, value = waiting.pop()
            if isinstance(value, Mapping):
                waiting += [([*names, str(key)], inner) for key, inner in value.items()]
            else:
                yield "/".join(names), _List(path, value)
    elif isinstance(data, list):
        yield "/".join([*top, path.stem]), _List(path, data)


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        return decode_text(data)
    except NotText as error:
        raise UsageError(f"{path} {error}") from None


def _of_text(path: Path) -> Lines:
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", _text(path))]
    return _parsed(str(path), [line for line in map(_without_comment, lines) if line])


def _of_list(found: _List) -> Lines:
    where, value = str(found.file), found.value
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise UsageError(f"{where}: a wildcard is a list of texts, not {value!r:.60}")
    texts, weights = [], []
    for number, entry in enumerate(items, start=1):
        item, weight = entry, None
        if isinstance(entry, Mapping) and entry.keys() <= {"text", "content", "weight"}:
            item, weight = entry.get("text") or entry.get("content"), entry.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
                raise UsageError(f"{where}: item {number} has the weight {weight!r:.60}; it should be a number")
        if item in (None, ""):
            continue
        if not isinstance(item, str):
            raise UsageError(f"{where}: item {number} of a wildcard is not text but {item!r:.60}; put it in quotes")
        lines = [_without_comment(line) for line in item.splitlines() if not line.lstrip().startswith("#")]
        texts.append("\n".join(lines).strip())
        weights.append(weight)
    return _parsed(where, texts, weights)


def _without_comment(line: str) -> str:
    """A line of a file without ` # what follows`."""
    return "" if line.startswith("#") else re.sub(r"\s#(?:\s.*)?$", "", line).rstrip()


def _parsed(where: str, texts: list[str], weights: Iterable[float | None] = ()) -> Lines:
    try:
        read = [weighted_line(text) for text in texts]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    given = [*weights] or [None] * len(read)
    lines = [(own if one is None else float(one), template) for one, (own, template) in zip(given, read, strict=True)]
    lines = [(weight, template) for weight, template in lines if weight > 0]
    if not lines:
        raise UsageError(f"{where}: all lines have the weight 0" if read else f"{where} has no lines")
    return Lines(tuple(template for _, template in lines), tuple(weight for weight, _ in lines))
