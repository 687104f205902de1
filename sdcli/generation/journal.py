"""The journal of finished images: an append-only file beside them, written before each image appears.

Where several processes write into one folder, each has a part of the journal, a file of its own: appending to one file
from many machines is not atomic on network file systems. Readers see all parts as one journal. What was read is held as
two numbers an entry, not as text: a journal may have millions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sdcli.errors import CannotWrite
from sdcli.images.formats import FORMAT_OF, ImageFormat
from sdcli.io.files import sha256
from sdcli.io.rows import MAX_LINE, append_rows, json_rows

NAME = ".sdcli-journal.jsonl"
PART = ".sdcli-journal-{}.jsonl"
"""The name of a part."""
SHARD = "shard-"
"""How the names of the parts begin that shards of a run write."""
_BEGINS = b'{"request": "'
"""How the line of an image begins, followed by the request's key of 64 hex digits."""
_FILE_BITS = 20
"""Bits of a position that name the file; the others are the offset of the line in it."""


class _Entry(NamedTuple):
    """An image that was written."""

    path: str
    sha256: str
    job: str | None
    """The job's key; None in entries of older versions, which had no digest of the weights."""


def entry_of(request_key: str, job_key: str | None, path: str, data: bytes) -> dict[str, Any]:
    """The entry of an image with these bytes at `path`, relative to the folder."""
    return {"request": request_key, "job": job_key, "path": path, "sha256": hashlib.sha256(data).hexdigest()}


class _RunEntry(NamedTuple):
    """The line that a run writes of itself."""

    time: float
    source: str
    base_seed: int
    plan: str | None


@dataclass(frozen=True)
class _JournalContents:
    """The files of a journal as they were when it was first read."""

    files: list[Path]
    runs: list[_RunEntry]
    """In the order in which they began."""
    keys: array[int]
    """The beginnings of the requests' keys, ascending; of equal ones the older line comes first."""
    positions: array[int]
    """Where the line of each of `keys` is."""


@dataclass
class Journal:
    """The journal of one output folder, with all its parts; it is read when something is looked for in it.

    An entry is written, with the digest of the file's bytes, before the file gets its name; so after a crash an entry
    whose file is there with this digest is finished, and any other is not. A torn last line is ignored.
    """

    folder: Path
    part: str | None = None
    """The name of this process's own part; None writes into the journal itself."""
    _begun: dict[str, Any] | None = None
    """The run's own entry, until the first image is written."""
    _known: dict[str, int] = field(default_factory=dict)
    """The base seeds of the runs that began here."""

    @cached_property
    def _contents(self) -> _JournalContents:
        return _read(self.folder)

    def base_seed(self, source: str) -> int | None:
        """The base seed of the last run of this prompts file."""
        if source in self._known:
            return self._known[source]
        return next((run.base_seed for run in reversed(self._contents.runs) if run.source == source), None)

    def begin_run(self, source: str, base_seed: int) -> None:
        """Set the base seed of a run, to be written with its first image: a run without any replaces no other's."""
        self._known[source] = base_seed
        self._begun = {"source": source, "base_seed": base_seed, "time": time.time()}

    def share_plan(self, digest: str, *, changed: bool) -> bool:
        """Write the plan of a divided run, for its other shards; whether they have the same one, as far as is known.

        Where the plan may have `changed` since an earlier run it is written in any case, and compared with the one that
        was written last; otherwise with all of them. Raises CannotWrite.
        """
        assert self._begun is not None
        source = self._begun["source"]
        known = self._plans(source)
        same = set(known[-1:] if changed else known) <= {digest}
        if same or changed:
            self._begun["plan"] = digest
            self.add([])
        if same and not changed:
            vars(self).pop("_contents", None)  # another shard may have begun at the same moment
            same = set(self._plans(source)) <= {digest}
        return same

    def _plans(self, source: str) -> list[str]:
        """In the order in which their shards began."""
        return [run.plan for run in self._contents.runs if run.source == source and run.plan is not None]

    def has(self, request_key: str) -> bool:
        """Whether there may be an entry of this request."""
        keys, wanted = self._contents.keys, _beginning(request_key)
        place = bisect_left(keys, wanted)
        return place < len(keys) and keys[place] == wanted

    def finished(
        self,
        request_key: str,
        job_key: Callable[[], str | None],
        *,
        taken: set[str],
        format: ImageFormat | None = None,
        name: Callable[[], str | None] | None = None,
    ) -> str | None:
        """The path, relative to the folder, of a whole image of this job (of this format) that is not in `taken` yet.

        `job_key` covers the weights, too. It is called only where an entry has one (older ones do not), and gives None
        where the weights are not here to be compared. With a `name` only an image at the path that it gives counts.
        """
        for entry in self._entries(request_key):
            if (
                entry.path not in taken
                and format in (None, FORMAT_OF.get(PurePath(entry.path).suffix.lower()))
                and (name is None or name() == entry.path)
                and (entry.job is None or job_key() in (None, entry.job))
                and _digest(self.folder / entry.path) == entry.sha256
            ):
                return entry.path
        return None

    def entry(self, request_key: str, path: str) -> dict[str, Any] | None:
        """The entry of the image at a path, if it is whole and that of this request."""
        for entry in self._entries(request_key):
            if entry.path == path and _digest(self.folder / path) == entry.sha256:
                return {"request": request_key, "job": entry.job, "path": path, "sha256": entry.sha256}
        return None

    def note(self, request_key: str, job_key: str | None, path: str, data: bytes) -> None:
        """Record that an image of this job is about to appear at `path` with these bytes. Raises CannotWrite.

        `job_key` is None where the weights are not known.
        """
        self.add([entry_of(request_key, job_key, path, data)])

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries, as `entry_of` makes them here or in another process. Raises CannotWrite."""
        begun = [] if self._begun is None else [self._begun]
        self._append([*begun, *entries])
        self._begun = None

    def take_in_parts(self, beginning: str = "") -> None:
        """Append what the parts hold to the journal itself, and remove them. To be called when no run writes into them.

        With a `beginning` those whose names begin so. The parts of shards stay in any case, since another shard may be
        at work. Raises CannotWrite.
        """
        for path in self._parts(beginning):
            self._take_in(path)
        vars(self).pop("_contents", None)

    def remove_parts(self, beginning: str) -> None:
        """Remove the parts whose names begin so, where the journal itself has all that they hold."""
        for path in self._parts(beginning):
            path.unlink(missing_ok=True)

    def _parts(self, beginning: str) -> list[Path]:
        """The parts whose names begin so, without those of shards."""
        ours, theirs = (PART.format(name).removesuffix(".jsonl") for name in (beginning, SHARD))
        names = _files(self.folder)[1:]
        return [path for path in names if path.name.startswith(ours) and not path.name.startswith(theirs)]

    def _take_in(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                rows = [dict(row.values) for row in json_rows(file) if not row.problem]
                size = file.tell()
        except OSError as error:
            raise CannotWrite(f"cannot read {path}: {error.strerror}") from None
        self._append(rows)
        with contextlib.suppress(OSError):
            if path.stat().st_size == size:
                path.unlink()

    def _entries(self, request_key: str) -> Iterator[_Entry]:
        """The entries of a request, the oldest first."""
        contents, wanted = self._contents, _beginning(request_key)
        place = bisect_left(contents.keys, wanted)
        while place < len(contents.keys) and contents.keys[place] == wanted:
            position = contents.positions[place]
            number, offset = position & ((1 << _FILE_BITS) - 1), position >> _FILE_BITS
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                with open(contents.files[number], "rb") as file:
                    file.seek(offset)
                    entry = json.loads(file.readline(MAX_LINE))
                if entry["request"] == request_key:
                    yield _Entry(str(entry["path"]), str(entry["sha256"]), entry.get("job"))
            place += 1

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries, and wait until they are on the disk."""
        path = self.folder / (NAME if self.part is None else PART.format(self.part))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                append_rows(descriptor, entries)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None


def _digest(file: Path) -> str | None:
    try:
        return sha256(file) if file.is_file() else None
    except OSError:
        return None


def _files(folder: Path) -> list[Path]:
    """The file of the journal itself, and those of its parts."""
    return [folder / NAME, *sorted(folder.glob(PART.format("*")))]


def _read(folder: Path) -> _JournalContents:
    """All files of a folder's journal, with one look at each line. Raises CannotWrite."""
    files = [path for path in _files(folder) if path.exists()]
    keys, positions = array("Q"), array("Q")
    runs: list[_RunEntry] = []
    for number, path in enumerate(files):
        try:
            with open(path, "rb") as file:
                offset = 0
                for line in iter(partial(file.readline, MAX_LINE), b""):
                    key = _key_of(line, runs)
                    if key is not None:
                        keys.append(key)
                        positions.append(offset << _FILE_BITS | number)
                    offset += len(line)
        except OSError as error:
            raise CannotWrite(f"cannot read {path}: {error.strerror}") from None
    runs.sort(key=lambda run: run.time)
    return _JournalContents(files, runs, *_sorted(keys, positions))


def _key_of(line: bytes, runs: list[_RunEntry]) -> int | None:
    """The beginning of the key in the line of an image; the line of a run is added to `runs`."""
    if line.startswith(_BEGINS) and line[77:78] == b'"':
        with contextlib.suppress(ValueError):
            return int(line[13:29], 16)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        entry = json.loads(line)
        if "base_seed" in entry:
            runs.append(
                _RunEntry(float(entry.get("time", 0)), entry["source"], int(entry["base_seed"]), entry.get("plan"))
            )
        else:
            return _beginning(entry["request"])
    return None


def _beginning(key: str) -> int:
    """The first 64 bits of a request's key, or of the digest of a key of another form."""
    if len(key) == 64:
        with contextlib.suppress(ValueError):
            return int(key[:16], 16)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def _sorted(keys: array[int], positions: array[int]) -> tuple[array[int], array[int]]:
    if not keys:
        return keys, positions
    import numpy as np  # only where there is something to sort: most runs begin in an empty folder

    order = np.argsort(np.frombuffer(keys, dtype=np.uint64), kind="stable")
    columns = (np.frombuffer(column, dtype=np.uint64)[order] for column in (keys, positions))
    first, second = (array("Q", column.tobytes()) for column in columns)
    return first, second
