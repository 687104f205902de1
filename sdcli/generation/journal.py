"""The journal of finished images: an append-only file beside them, written before each image appears."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdcli.errors import CannotWrite
from sdcli.io.rows import append_row, json_rows

NAME = ".sdcli-journal.jsonl"


class _Entry(NamedTuple):
    """An image that was written."""

    path: str
    sha256: str
    job: str | None
    """The job's key; None in entries of older versions, which had no digest of the weights."""


@dataclass
class Journal:
    """The journal of one output folder.

    An entry is written, with the digest of the file's bytes, before the file gets its name; so after a crash an entry
    whose file is there with this digest is finished, and any other is not. A torn last line is ignored.
    """

    folder: Path
    _finished: dict[str, list[_Entry]] = field(default_factory=lambda: defaultdict(list))
    _base_seeds: dict[str, int] = field(default_factory=dict)
    _begun: dict[str, Any] | None = None
    """The run's own entry, until the first image is written."""

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Read the journal of a folder, or begin an empty one."""
        journal = cls(folder)
        try:
            with open(folder / NAME, "rb") as file:
                entries = [row.values for row in json_rows(file)]
        except FileNotFoundError:
            return journal
        except OSError as error:
            raise CannotWrite(f"cannot read {folder / NAME}: {error.strerror}") from None
        for entry in entries:
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
            file = self.folder / entry.path
            if (
                entry.path not in taken
                and (entry.job is None or job_key() in (None, entry.job))
                and file.is_file()
                and hashlib.sha256(file.read_bytes()).hexdigest() == entry.sha256
            ):
                return entry.path
        return None

    def note(self, request_key: str, job_key: str | None, path: str, data: bytes) -> None:
        """Record that an image of this job is about to appear at `path` with these bytes. Raises CannotWrite.

        `job_key` is None where the weights are not known.
        """
        if self._begun is not None:
            self._append(self._begun)
            self._begun = None
        digest = hashlib.sha256(data).hexdigest()
        self._append({"request": request_key, "job": job_key, "path": path, "sha256": digest})

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                append_row(descriptor, entry)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CannotWrite(f"cannot write {self.folder / NAME}: {error.strerror}") from None
