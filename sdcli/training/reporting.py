"""Where a run's events go: RUN/log.jsonl and the trackers. What fails here is counted and reported, and ends no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import Accelerator

from sdcli.errors import CannotWrite, UsageError, first_line
from sdcli.training.events import Event, RunNote, StepMetrics, ValidationMetrics
from sdcli.training.run_log import RunLog, log_event
from sdcli.training.settings import TrainSettings

LINES, FIGURES, SYNCS = "lines of log.jsonl", "reports to trackers", "syncs of log.jsonl"


def start_trackers(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Start the trackers of --report-to, in every process. Raises UsageError for one that is not installed."""
    if not settings.report_to:
        return
    config = {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in settings.model_dump(mode="json").items()
        if value is not None
    }
    try:
        accelerator.init_trackers("sdcli", config=config)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--report-to {' '.join(settings.report_to)}: {error}") from None
    missing = set(settings.report_to) - {tracker.name for tracker in accelerator.trackers}
    if missing and accelerator.is_main_process:
        raise UsageError(f"--report-to {min(missing)} needs its package: pip install {min(missing)}")


@dataclass
class Reporting:
    """Logs and reports the events of a run, in its first process."""

    log: RunLog
    accelerator: Accelerator
    trackers: bool
    lost: Counter[str] = field(default_factory=Counter)
    """What could not be written so far, by its kind."""
    _notes: list[RunNote] = field(default_factory=list)
    _failing: dict[str, int] = field(default_factory=dict)
    """What failed the last time -> how often in a row."""

    def report(self, event: Event) -> list[RunNote]:
        """Log an event, and report figures to the trackers; returns warnings about what failed now."""
        self._try(LINES, lambda: log_event(self.log, event))
        if self.trackers:
            self._try(FIGURES, lambda: self._track(event))
        notes, self._notes = self._notes, []
        for note in notes:
            self._try(LINES, lambda text=note.text: self.log.write("note", text=text))  # type: ignore[misc]
        return notes

    def sync(self) -> None:
        """Sync the log to the disk, before a checkpoint; a warning about a failure comes with the next event."""
        self._try(SYNCS, self.log.sync)

    def _try(self, what: str, do: Callable[[], None]) -> None:
        """Do one thing; the first failure in a row is reported, and so is its end."""
        try:
            do()
        except Exception as error:
            self.lost[what] += 1
            if not self._failing.get(what):
                sentence = str(error) if isinstance(error, CannotWrite) else f"{what}: {first_line(error)}"
                self._notes.append(RunNote(f"{sentence}; the run goes on"))
            self._failing[what] = self._failing.get(what, 0) + 1
            return
        count = self._failing.pop(what, 0)
        if count:
            self._notes.append(RunNote(f"{count} {what} are missing"))

    def _track(self, event: Event) -> None:
        if isinstance(event, StepMetrics):
            values = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, **event.figures}
            self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=event.step)
        elif isinstance(event, ValidationMetrics):
            self.accelerator.log({f"validation/{name}": v for name, v in event.figures.items()}, step=event.step)
