"""The writer of one run: file names that are free, the journal, whole files, and the side files of each image.

Imports no torch: where a warm worker generates, the images are written by a process that has none.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from sdcli.errors import BadOutput, OutOfMemory, UsageError
from sdcli.generation.events import SideFile
from sdcli.generation.filenames import begins_with_index, is_literal, name_of
from sdcli.generation.journal import Journal
from sdcli.generation.plan import Batch, plan_digest
from sdcli.generation.resolve.jobs import ResolvedJob, key_of
from sdcli.generation.run_shard import RunShard
from sdcli.generation.settings import OutputSettings
from sdcli.io.files import AlreadyExists, check_new, numbered, write_whole
from sdcli.io.temporary_files import sweep
from sdcli.models.weight_digests import weights_digest


class Writer:
    """Writes the images of one run into one folder. With a journal, a later run finds the finished ones."""

    def __init__(
        self, output: OutputSettings, journal: Journal | None = None, *, shard: RunShard | None = None
    ) -> None:
        """`shard`: the part of the run that is written here; it needs a journal, where it tells its plan."""
        self.output, self.shard = output, shard
        self._journal = journal
        self._names: set[str] = set()
        """Names that this run wrote or keeps, which are not replaced even where files may be overwritten."""
        self._distinct = begins_with_index(output.template)
        self._keys: dict[int, str | None] = {}
        """Keys of the jobs that are being generated, for the journal."""

    @property
    def has_journal(self) -> bool:
        return self._journal is not None

    def divided(self, batches: Sequence[Batch]) -> tuple[Sequence[Batch], str]:
        """The batches of the whole run -> those of this writer's shard, and a note for the user, or "".

        Raises UsageError where another shard in this folder made another plan: together they would not give one run. A
        run that resumes may have another plan than before, since its prompts file may have grown; then it is a note.
        """
        if self._journal is None or self.shard is None:
            return batches, ""
        note = ""
        if not self._journal.share_plan(plan_digest(batches), changed=self.output.resume):
            note = (
                f"another shard in {self.output.outdir} divides other batches, so that together they would not give "
                "one run: its prompts, options, input files, --batch-size or kind of device differ"
            )
            if not self.output.resume:
                raise UsageError(f"{note}; make them equal and choose another --outdir, or use --resume")
            note += "; that is well if all of these were changed for all shards since"
        return list(self.shard.part(batches)), note

    def finished(self, jobs: Sequence[ResolvedJob], own: Container[int] | None = None) -> dict[int, Path]:
        """The whole images of an earlier run, by the indices of their jobs; none unless the run resumes one.

        Of equal requests each image goes to the job whose name it has, where there is one. Where the run is a shard,
        `own` are the indices of its jobs; only their images, and those that could be theirs, are looked at. Temporary
        files that a killed run left are removed on the way.
        """
        if self._journal is None or not self.output.resume:
            return {}
        sweep(self.output.outdir)
        wanted: set[str] | None = None
        if own is not None and self.shard is not None:
            wanted = {job.request.key() for job in jobs if job.index in own}
        found: dict[int, Path] = {}
        taken: set[str] = set()
        digest = cache(weights_digest)

        def look(job: ResolvedJob, request_key: str, name: Callable[[], str | None] | None) -> bool:
            assert self._journal is not None
            key = partial(key_of, job, digest)
            path = self._journal.finished(request_key, key, taken=taken, format=self.output.format, name=name)
            if path is not None:
                taken.add(path)
                found[job.index] = self.output.outdir / path
            return path is not None

        others: list[tuple[int, str]] = []
        """Jobs with entries of their requests, none of which has their name: their places, and the requests' keys."""
        for place, job in enumerate(jobs):
            key = job.request.key()
            if not self._journal.has(key) or (wanted is not None and key not in wanted):
                continue
            if not look(job, key, partial(_name_or_none, job, self.output)):
                others.append((place, key))
        for place, key in others:
            look(jobs[place], key, None)
        self._names |= {path.lower() for path in taken}
        return found

    def begin(self, jobs: Sequence[ResolvedJob]) -> None:
        """Remember the digests of the weights that these jobs are generated with next, for the journal.

        To be called before loading: weights that change meanwhile are not those of these images.
        """
        if self._journal is not None:
            digest = cache(weights_digest)
            self._keys = {job.index: key_of(job, digest) for job in jobs}

    def side_files(self, image: Path) -> tuple[Path, ...]:
        """The side files of a finished image; of a folder of them the last one that is written."""
        return tuple(self.output.beside(image))

    def reserve(self, jobs: Iterable[ResolvedJob]) -> dict[int, str]:
        """The names that the images of jobs will get, by index, where other processes write them.

        A job whose name cannot be made has none; writing it raises the error.
        """
        names: dict[int, str] = {}
        for job in jobs:
            with contextlib.suppress(UsageError):
                number, name = next(one for one in self._free_names(job) if self._may_write(one[1]))
                names[job.index] = name
                if number > 1 or not self._distinct:  # names that no other job can have need not be held
                    self._names.add(name.lower())
        return names

    def write(self, job: ResolvedJob, data: bytes) -> Path:
        """Write the file of one image under a name that is free or may be overwritten."""
        output = self.output
        for number, name in self._free_names(job):
            try:
                for file in self.side_files(output.outdir / name):
                    check_new(file, overwrite=output.overwrite)
                if self._journal is not None:
                    self._journal.note(job.request.key(), self._keys[job.index], name, data)
                write_whole(output.outdir / name, data, overwrite=output.overwrite)
            except AlreadyExists:
                if is_literal(output.template) and number == 1:
                    raise
                continue
            self._names.add(name.lower())
            return output.outdir / name
        raise AssertionError("unreachable")

    def _free_names(self, job: ResolvedJob) -> Iterator[tuple[int, str]]:
        """(number, name) of the names of an image, as they are tried, without those that this run has used."""
        name = name_of(job, self.output)
        for number in itertools.count(1):
            candidate = str(numbered(name, number))
            if candidate.lower() not in self._names:
                yield number, candidate

    def _may_write(self, name: str) -> bool:
        path = self.output.outdir / name
        return self.output.overwrite or not any(map(os.path.lexists, (path, *self.side_files(path))))

    def write_side_files(self, image: Path, files: Iterable[SideFile], *, replace: bool) -> tuple[Path, ...]:
        """Write the side files of an image, whose name gives them theirs.

        `replace` overwrites existing ones. Raises UsageError, BadOutput and OutOfMemory where one cannot be made.
        """
        written = []
        try:
            for suffix, data in files:
                path = image.parent / f"{image.stem}{suffix}"
                write_whole(path, data, overwrite=replace or self.output.overwrite)
                written.append(path)
        except (BadOutput, OutOfMemory, UsageError) as error:
            raise type(error)(f"{image} is generated, but not all of its side files: {error}") from error
        return tuple(written)


def _name_or_none(job: ResolvedJob, output: OutputSettings) -> str | None:
    """The name of a job's image; None where it cannot have one, which writing it reports."""
    try:
        return str(name_of(job, output))
    except UsageError:
        return None
