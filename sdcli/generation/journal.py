"""The journal of finished images: an append-only file beside them, written before each image appears.

Where several processes write into one folder, each has a part of the journal, a file of its own: appending to one file
from many machines is not atomic on network file systems. Readers see all parts as one journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from sdcli.errors import CannotWrite
from sdcli.io.rows import append_row, json_rows

NAME = ".sdcli-journal.jsonl"
PART = ".sdcli-journal-{}.jsonl"
"""The name of a part."""


class _Entry(NamedTuple):
    """An image that was written."""

    path: str
    sha256: str
    job: str | None
    """The job's key; None in entries of older versions, which had no digest of the weights."""


def entry_of(request_key: str, job_key: str | None, path: str, data: bytes) -> dict[str, Any]:
    """The entry of an image with these bytes at `path`, relative to the folder."""
    return {"request": request_key, "job": job_key, "path": path, "sha256": hashlib.sha256(data).hexdigest()}


@dataclass
class Journal:
    """The journal of one output folder.

    An entry is written, with the digest of the file's bytes, before the file gets its name; so after a crash an entry
    whose file is there with this digest is finished, and any other is not. A torn last line is ignored.
    """

    folder: Path
    part: str | None = None
    """The name of this process's own part; None writes into the journal itself."""
    _finished: dict[str, list[_Entry]] = field(default_factory=lambda: defaultdict(list))
    _base_seeds: dict[str, int] = field(default_factory=dict)
    _begun: dict[str, Any] | None = None
    """The run's own entry, until the first image is written."""

    @classmethod
    def open(cls, folder: Path, part: str | None = None) -> Journal:
        """Read the journal of a folder with all its parts, the one that was changed last at the end, or begin one."""
        journal = cls(folder, part)
        for file in journal._files():
            for entry in journal._rows(file):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if "base_seed" in entry:
                        journal._base_seeds[entry["source"]] = int(entry["base_seed"])
                    else:
                        finished = _Entry(str(entry["path"]), str(entry["sha256"]), entry.get("job"))
                        journal._finished[entry["request"]].append(finished)
        return journal

    def base_seed(self, source: str) -> int | None:
        """The base seed of the last run of this prompts file."""
        return self._base_seeds.get(source)

    def begin_run(self, source: str, base_seed: int) -> None:
        """Set the base seed of a run, to be written with its first image: a run without any replaces no other's."""
        self._base_seeds[source] = base_seed
        self._begun = {"source": source, "base_seed": base_seed}

    def finished(self, request_key: str, job_key: Callable[[], str | None], *, taken: set[str]) -> str | None:
        """The path, relative to the folder, of a whole image of this job that is not in `taken` yet.

        `job_key` covers the weights, too. It is called only where an entry has one (older ones do not), and gives None
        where the weights are not here to be compared.
        """
        for entry in self._finished.get(request_key, ()):
            if (
                entry.path not in taken
                and (entry.job is None or job_key() in (None, entry.job))
                and self._is_whole(entry)
            ):
                return entry.path
        return None

    def entry(self, request_key: str, path: str) -> dict[str, Any] | None:
        """The entry of the image at a path, if it is whole and that of this request."""
        for entry in self._finished.get(request_key, ()):
            if entry.path == path and self._is_whole(entry):
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

    def take_in_parts(self) -> None:
        """Append what the parts hold to the journal itself, and remove them. To be called when no run writes into them.

        Raises CannotWrite.
        """
        for file in self._files():
            if file.name == NAME:
                continue
            size, rows = file.stat().st_size, list(self._rows(file))
            sources = {row.get("source") for row in rows if "base_seed" in row}
            last = [{"source": one, "base_seed": self._base_seeds[one]} for one in sources if one in self._base_seeds]
            self._append([*(row for row in rows if "base_seed" not in row), *last])  # the part may be older than that
            with contextlib.suppress(OSError):
                if file.stat().st_size == size:
                    file.unlink()

    def _files(self) -> list[Path]:
        """The files of the journal, in the order of their last changes."""
        names = [NAME]
        with contextlib.suppress(OSError):  # a folder that cannot be listed may still hold a journal
            names += [name for name in os.listdir(self.folder) if fnmatch(name, PART.format("*"))]
        changed: list[tuple[int, str]] = []
        for name in names:
            try:
                changed.append((os.stat(self.folder / name).st_mtime_ns, name))
            except FileNotFoundError:
                continue
            except OSError:
                changed.append((0, name))  # opening it will say why
        return [self.folder / name for _, name in sorted(changed)]

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """The entries of a file, as they are. Raises CannotWrite."""
        try:
            with open(path, "rb") as file:
                yield from (dict(row.values) for row in json_rows(file) if not row.problem)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CannotWrite(f"cannot read {path}: {error.strerror}") from None

    def _is_whole(self, entry: _Entry) -> bool:
        file = self.folder / entry.path
        return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry.sha256

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries, and wait until they are on the disk."""
        path = self.folder / (NAME if self.part is None else PART.format(self.part))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                for entry in entries:
                    append_row(descriptor, entry)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
