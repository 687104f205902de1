"""The log of a training run: RUN/log.jsonl, append-only, with one JSON object per line.

    {"event": "start", "time": 1767225600.0, "steps": 1000, "start_step": 0, "batch": 16, "versions": {...}, ...}
    {"event": "train", "time": ..., "step": 1, "loss": 0.98, "lr": 0.0001, "grad_norm": 1.7, "samples": 16, ...}
    {"event": "validation", "time": ..., "step": 500, "loss": 0.31}
    {"event": "checkpoint", "time": ..., "step": 500, "path": "checkpoint-500", "seconds": 0.4}
    {"event": "sample", "time": ..., "step": 500, "paths": ["samples/step-500.png"]}
    {"event": "resume", "time": ..., "step": 500}
    {"event": "note", "time": ..., "text": "..."}
    {"event": "end", "time": ..., "step": 1000, "reason": "..."}

`time` is in seconds since 1970. Every line is strict JSON: NaN and infinities are the strings "NaN", "Infinity" and
"-Infinity". Nothing is rewritten: a resumed run adds a `resume` line, after which later steps are done again, and
`read_log` leaves out what that undid. So the log of an interrupted run reads like that of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdcli import __version__
from sdcli.errors import CannotWrite, NotFound, SdcliError
from sdcli.io.files import open_writable, whole_file
from sdcli.io.rows import append_row, json_rows
from sdcli.training.events import (
    CheckpointSaved,
    Event,
    Preparation,
    RunEnd,
    RunNote,
    RunStart,
    SamplesSaved,
    StepMetrics,
    ValidationMetrics,
)

NAME = "log.jsonl"
MAX_LINE = 1024 * 1024
"""Bytes; sdcli writes no longer lines."""
STEPPED = frozenset({"train", "validation", "checkpoint", "sample"})
"""Events that belong to a step; a resume from an earlier step undoes them."""


class RunLog:
    """The log of a run, open for writing by its first process. A context manager."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, run: Path) -> RunLog:
        """Open the log of a run folder, and create it if missing; lines are appended.

        A log that a copy of the run shares, by a hard link, is copied first. Raises CannotWrite.
        """
        path = run / NAME
        with _cannot_write(path):
            run.mkdir(parents=True, exist_ok=True)
            descriptor = open_writable(path, os.O_RDWR | os.O_APPEND)
            if os.fstat(descriptor).st_nlink > 1:
                os.close(descriptor)
                with whole_file(path, overwrite=True) as temporary:
                    shutil.copyfile(path, temporary)
                descriptor = open_writable(path, os.O_RDWR | os.O_APPEND)
            return cls(path, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. Readers see it at once, and it survives `kill -9` (but a power cut only after `sync`).

        Facts are JSON values, mappings, sequences and paths. Raises CannotWrite.
        """
        entry = {"event": event, "time": round(time.time(), 3), **facts}
        with _cannot_write(self._path):
            append_row(self._descriptor, strict_json(entry))

    def rewind(self, step: int) -> None:
        """Record that the run continues after `step`: entries of later steps no longer count."""
        self.write("resume", step=step)

    def sync(self) -> None:
        """Sync all lines to the disk; done before each checkpoint, so that a power cut loses no step before it."""
        with _cannot_write(self._path):
            os.fsync(self._descriptor)

    def relative(self, path: Path) -> Path:
        """A path inside the run relative to it, so that the run can be moved; other paths unchanged."""
        return path.relative_to(self._path.parent) if path.is_relative_to(self._path.parent) else path

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def log_event(log: RunLog, event: Event, **facts: Any) -> None:
    """Write an event of the training loop with further facts; `Preparation` is not logged.

    Paths inside the run are written relative to it. A `RunStart` after the first step writes a `resume` line first.
    Raises CannotWrite.
    """
    own = {name: getattr(event, name) for name in event.__dataclass_fields__}
    match event:
        case Preparation():
            return
        case RunStart():
            if event.start_step:
                log.rewind(event.start_step)
            log.write("start", **own, versions=versions(), **facts)
        case StepMetrics():
            figures = own.pop("figures")
            known = {name: value for name, value in own.items() if value is not None}
            log.write("train", **{**figures, **known}, **facts)
        case ValidationMetrics():
            log.write("validation", **{**event.figures, "step": event.step}, **facts)
        case CheckpointSaved():
            log.write("checkpoint", **{**own, "path": log.relative(event.path)}, **facts)
        case SamplesSaved():
            log.write("sample", step=event.step, paths=[log.relative(path) for path in event.paths], **facts)
        case RunNote():
            log.write("note", text=event.text, **facts)
        case RunEnd():
            log.write("end", **own, **facts)


def versions() -> dict[str, str]:
    """The versions of the packages that affect a run, read without importing them."""
    found = {"sdcli": __version__}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Log:
    """The entries of a run's log without those that a resume undid."""

    entries: tuple[dict[str, Any], ...]
    """In the order of writing; only the last one for each kind of event and step."""
    damaged: int = 0
    """The number of invalid lines, such as one that a killed process left unfinished."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """The entries of one kind of event."""
        return [entry for entry in self.entries if entry["event"] == event]

    def series(self, event: str, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of a figure; values may be NaN and infinite."""
        steps, values = [], []
        for entry in self.entries:
            if entry["event"] == event and (value := _number(entry.get(name))) is not None:
                steps.append(int(entry["step"]))
                values.append(value)
        return steps, values

    def metrics(self, event: str) -> list[str]:
        """The names of an event's figures, in the order of their first appearance."""
        names: dict[str, None] = {}
        for entry in self.of(event):
            names.update({name: None for name, value in entry.items() if _number(value) is not None})
        return [name for name in names if name not in {"event", "time", "step"}]


def read_log(run: Path) -> Log:
    """Read a run's log, which may be growing. Invalid lines are counted and skipped.

    Raises NotFound if there is no log, and SdcliError if it cannot be read.
    """
    path = run / NAME
    entries: dict[Any, dict[str, Any]] = {}
    damaged = 0
    try:
        with path.open("rb") as file:
            for row in json_rows(file, max_bytes=MAX_LINE):
                entry = dict(row.values)
                if not _is_entry(entry):
                    damaged += 1
                    continue
                if (step := _resumed_from(entry)) is not None:
                    entries = {key: old for key, old in entries.items() if not _undone(old, step)}
                key = (entry["event"], entry["step"]) if entry["event"] in STEPPED else row.line
                entries.pop(key, None)  # a repeated entry moves to the end
                entries[key] = entry
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{run} is not a training run: there is no {path}") from None
    except OSError as error:
        raise SdcliError(f"cannot read {path}: {error.strerror}") from None
    return Log(tuple(entries.values()), damaged)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    if not isinstance(entry.get("event"), str):
        return False
    step = entry.get("start_step") if entry["event"] == "start" else entry.get("step")
    counted = entry["event"] in {*STEPPED, "start", "resume"}
    return not counted or (type(step) is int and 0 <= step < 2**63)


def _resumed_from(entry: Mapping[str, Any]) -> int | None:
    """The step after which an entry starts or resumes the run; None for other entries."""
    step = {"resume": "step", "start": "start_step"}.get(entry["event"])
    return int(entry[step]) if step is not None else None


def _undone(entry: Mapping[str, Any], step: int) -> bool:
    """Whether a resume after `step` undoes an entry: one of a later step, or the end of the run."""
    return entry["event"] == "end" or (entry["event"] in STEPPED and entry["step"] > step)


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer with hundreds of digits
        return math.inf if value > 0 else -math.inf


def strict_json(value: Any) -> Any:
    """A value for strict JSON, with NaN and infinities as strings."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {str(key): strict_json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [strict_json(inner) for inner in value]
        case Path():
            return str(value)
        case _:
            return value


@contextlib.contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into a CannotWrite that names the file."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
