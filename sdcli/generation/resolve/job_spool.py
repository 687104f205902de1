"""Many jobs in a temporary file instead of in memory: of each, what its request has other than one before it.

A resolved request takes some 4 KB of memory, and a job in the file some 80 bytes; in memory stay 8 bytes a job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from sdcli.errors import CannotWrite
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob
from sdcli.models.registry import ControlNetSpec, ModelSpec
from sdcli.request.schema import ResolvedRequest

TEMPLATES = 256
"""Requests in memory, of which those in the file say what they have other than."""
_Models = tuple[ModelSpec, ModelSpec | None, Mapping[str, ControlNetSpec]]


class JobSpool(Sequence[ResolvedJob | BadJob]):
    """Jobs in the order in which they were given, made anew whenever they are asked for; the file ends with it.

    Raises CannotWrite where the folder for temporary files has no room.
    """

    def __init__(self, jobs: Iterable[ResolvedJob | BadJob]) -> None:
        self._offsets = array("Q", [0])
        """Where each job begins and, at last, where the file ends."""
        self._bad: dict[int, BadJob] = {}
        self._templates: list[ResolvedRequest] = []
        self._kinds: dict[Any, int] = {}
        self._models: list[_Models] = []
        self._model_numbers: dict[Any, int] = {}
        with _reported():
            self._file = tempfile.TemporaryFile(prefix="sdcli-jobs-")  # noqa: SIM115
        for place, job in enumerate(jobs):
            data = b""
            if isinstance(job, BadJob):
                self._bad[place] = job
            else:
                data = self._packed(job)
            with _reported():
                self._file.write(data)
            self._offsets.append(self._offsets[-1] + len(data))
        with _reported():
            self._file.flush()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> ResolvedJob | BadJob: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ResolvedJob | BadJob]: ...
    def __getitem__(self, place: int | slice) -> ResolvedJob | BadJob | Sequence[ResolvedJob | BadJob]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place = range(len(self))[place]
        bad = self._bad.get(place)
        return self._unpacked(place) if bad is None else bad

    def __iter__(self) -> Iterator[ResolvedJob | BadJob]:
        return (self[place] for place in range(len(self)))

    def resolved(self, *, without: Container[int] = ()) -> SpooledJobs:
        """Those that can be generated, without the ones of these indices."""
        places = (place for place in range(len(self)) if place not in self._bad)
        if without:
            places = (place for place in places if self[place].index not in without)
        return SpooledJobs(self, array("I", places))

    def _packed(self, job: ResolvedJob) -> bytes:
        request, values = job.request, vars(job.request)
        number = self._template_of(request)
        template = vars(self._templates[number])
        other = {name: value for name, value in values.items() if not _same(value, template[name])}
        models: _Models = (job.model, job.refiner, job.controlnets)
        row = job.index, number, other, self._number_of(models), job.custom_id, job.line
        return pickle.dumps(row, pickle.HIGHEST_PROTOCOL)

    def _unpacked(self, place: int) -> ResolvedJob:
        start, end = self._offsets[place], self._offsets[place + 1]
        index, number, other, models, custom_id, line = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        request = self._templates[number].with_checked(other)
        model, refiner, controlnets = self._models[models]
        return ResolvedJob(index, request, model, refiner, controlnets, custom_id, line)

    def _template_of(self, request: ResolvedRequest) -> int:
        """The number of a request that has the same fields given and, where there are not too many, the same model."""
        given = frozenset(request.model_fields_set)
        for kind in ((given, request.model, request.width, request.height, request.steps), given):
            number = self._kinds.get(kind)
            if number is None and (len(self._templates) < TEMPLATES or kind is given):
                number = self._kinds[kind] = len(self._templates)
                self._templates.append(request)
            if number is not None:
                return number
        raise AssertionError("unreachable")

    def _number_of(self, models: _Models) -> int:
        model, refiner, controlnets = models
        key = id(model), id(refiner), tuple((name, id(one)) for name, one in controlnets.items())
        number = self._model_numbers.setdefault(key, len(self._models))
        if number == len(self._models):
            self._models.append(models)  # which keeps their ids
        return number


class SpooledJobs(Sequence[ResolvedJob]):
    """Some of the jobs of a spool that can be generated."""

    def __init__(self, spool: JobSpool, places: array[int]) -> None:
        self._spool, self._places = spool, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> ResolvedJob: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ResolvedJob]: ...
    def __getitem__(self, place: int | slice) -> ResolvedJob | Sequence[ResolvedJob]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        job = self._spool[self._places[place]]
        assert isinstance(job, ResolvedJob)
        return job

    def __iter__(self) -> Iterator[ResolvedJob]:
        return (self[place] for place in range(len(self)))


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"cannot write the list of jobs into {tempfile.gettempdir()}: {error.strerror}; TMPDIR names another folder"
        ) from None


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, in their kinds and signs, too."""
    if value is other:
        return True
    if type(value) is not type(other) or value != other:
        return False
    return isinstance(value, str | int) or repr(value) == repr(other)
