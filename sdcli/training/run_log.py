"""The log of a training run: RUN/log.jsonl, append-only, one JSON object a line; written, rewound and read here.

    {"event": "start", "time": 1767225600.0, "steps": 1000, "start_step": 0, "batch": 16, "versions": {...}, ...}
    {"event": "train", "time": ..., "step": 1, "loss": 0.98, "lr": 0.0001, "grad_norm": 1.7, "samples": 16, ...}
    {"event": "validation", "time": ..., "step": 500, "loss": 0.31}
    {"event": "checkpoint", "time": ..., "step": 500, "path": "checkpoint-500", "seconds": 0.4}
    {"event": "sample", "time": ..., "step": 500, "paths": ["samples/step-500.png"]}
    {"event": "resume", "time": ..., "step": 500}
    {"event": "note", "time": ..., "text": "..."}
    {"event": "end", "time": ..., "step": 1000, "reason": "..."}

`time` is in seconds since 1970. Every line is strict JSON: NaN and infinities are the strings "NaN", "Infinity" and
"-Infinity". Nothing is ever rewritten: a resumed run marks with a `resume` line that steps after it are done again, and
`read_log` leaves out what was undone by that. So the log of an interrupted run reads as that of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdcli import __version__
from sdcli.errors import CannotWrite, NotFound, SdcliError
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
"""Bytes; a longer line is none of ours."""
STEPPED = frozenset({"train", "validation", "checkpoint", "sample"})
"""Events of a step, which a resume from an earlier step undoes."""


class RunLog:
    """The log of one run, open for writing. Only the first process of a run may have it. A context manager."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, run: Path) -> RunLog:
        """Open the log of a run folder, made when it is not there; lines are added to what it holds.

        Raises CannotWrite.
        """
        path = run / NAME
        with _sentences(path):
            run.mkdir(parents=True, exist_ok=True)
            return cls(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; readers see it at once, and it survives `kill -9` (not a power cut: see `sync`).

        Facts are JSON values, mappings, sequences and paths. Raises CannotWrite.
        """
        entry = {"event": event, "time": round(time.time(), 3), **facts}
        with _sentences(self._path):
            append_row(self._descriptor, strict_json(entry))

    def rewind(self, step: int) -> None:
        """Say that the run goes on from after `step`: entries of later steps that are there do not count any more."""
        self.write("resume", step=step)

    def sync(self) -> None:
        """Bring all lines onto the disk: before a checkpoint is committed, so that no power cut loses earlier steps."""
        with _sentences(self._path):
            os.fsync(self._descriptor)

    def relative(self, path: Path) -> Path:
        """A path inside the run as seen from there, so that the run can be moved; any other as it is."""
        return path.relative_to(self._path.parent) if path.is_relative_to(self._path.parent) else path

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def log_event(log: RunLog, event: Event, **facts: Any) -> None:
    """Write an event of the training loop, with further facts beside its own; `Preparation` leaves no line.

    Paths inside the run are written relative to it. A `RunStart` that does not begin at the first step writes its
    `resume` line before it. Raises CannotWrite.
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
            shown = own.pop("shown")
            known = {name: value for name, value in own.items() if value is not None}
            log.write("train", **{**shown, **known}, **facts)
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
    """The versions that a run's numbers depend on, read without importing anything."""
    found = {"sdcli": __version__}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Log:
    """What a run's log says, without the steps that a resume undid."""

    entries: tuple[dict[str, Any], ...]
    """In the order they were written; of one kind of event and one step, only the last."""
    damaged: int = 0
    """Lines that are no entry, such as one that a killed process left unfinished."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """The entries of one kind of event."""
        return [entry for entry in self.entries if entry["event"] == event]

    def series(self, event: str, name: str) -> tuple[list[int], list[float]]:
        """Steps, and the values of a figure at them; NaN and infinities are among the values."""
        steps, values = [], []
        for entry in self.entries:
            if entry["event"] == event and (value := _number(entry.get(name))) is not None:
                steps.append(int(entry["step"]))
                values.append(value)
        return steps, values

    def metrics(self, event: str) -> list[str]:
        """The names of the figures that an event has, in the order of their first appearance."""
        names: dict[str, None] = {}
        for entry in self.of(event):
            names.update({name: None for name, value in entry.items() if _number(value) is not None})
        return [name for name in names if name not in {"event", "time", "step"}]


def read_log(run: Path) -> Log:
    """Read a run's log, which may be growing meanwhile. Damaged lines are counted, none is fatal.

    Raises NotFound where there is no log, and SdcliError where it cannot be read.
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
                if (step := _goes_on_after(entry)) is not None:
                    entries = {key: old for key, old in entries.items() if not _undone(old, step)}
                key = (entry["event"], entry["step"]) if entry["event"] in STEPPED else row.line
                entries.pop(key, None)  # the later one also stands later
                entries[key] = entry
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{run} is no training run: there is no {path}") from None
    except OSError as error:
        raise SdcliError(f"cannot read {path}: {error.strerror}") from None
    return Log(tuple(entries.values()), damaged)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    if not isinstance(entry.get("event"), str):
        return False
    step = entry.get("start_step") if entry["event"] == "start" else entry.get("step")
    counted = entry["event"] in {*STEPPED, "start", "resume"}
    return not counted or (type(step) is int and 0 <= step < 2**63)


def _goes_on_after(entry: Mapping[str, Any]) -> int | None:
    """After which step a run goes on with this entry; None where it is not the start of a process."""
    step = {"resume": "step", "start": "start_step"}.get(entry["event"])
    return int(entry[step]) if step is not None else None


def _undone(entry: Mapping[str, Any], step: int) -> bool:
    """Whether going on after `step` takes an entry back: later steps, and that the run had ended."""
    return entry["event"] == "end" or (entry["event"] in STEPPED and entry["step"] > step)


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf if value > 0 else -math.inf


def strict_json(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinities as strings."""
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
def _sentences(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a CannotWrite that names the file."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
