"""A training command from its data to its last checkpoint: what all trainers share around the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from sdcli.errors import NotFound, SdcliError, Stop, UsageError
from sdcli.io.devices import free_memory
from sdcli.models.registry import Registry
from sdcli.training import run_folder
from sdcli.training.events import Event, RunEnd, RunNote
from sdcli.training.forecast import Forecast
from sdcli.training.launch import MARK
from sdcli.training.loop import Plan, Trainer, make_accelerator
from sdcli.training.orders import SaveRequest, agree_on_names
from sdcli.training.precision import check_same_precision, with_precision
from sdcli.training.reporting import Reporting, start_trackers
from sdcli.training.run_folder import absolute_data, with_absolute_paths
from sdcli.training.run_log import RunLog, read_log
from sdcli.training.settings import TrainSettings
from sdcli.training.state.checkpoint import CheckpointInfo, newest_checkpoint
from sdcli.training.state.copied_run import restore_links
from sdcli.training.state.model_links import write_frozen_parts
from sdcli.training.state.run_lock import run_lock
from sdcli.training.task import Networks, Task
from sdcli.training.watching import WATCHED

S = TypeVar("S", bound=TrainSettings)
LATER_FACTS = {
    "classes_fingerprint": "images have other classes",
    "groups_fingerprint": "captions are alternatives of other captions",
}
"""Facts about the data that checkpoints of earlier versions lack, and what it means where they differ."""


@dataclass(frozen=True)
class RunSetup:
    """A task that is ready to train, and the files around it that make RUN a model folder."""

    task: Task
    samples: int
    """The number of items of an epoch."""
    links: Mapping[str, str]
    """RUN/<part> -> its folder or file in a checkpoint."""
    write_frozen: Callable[[Path], None]
    """Writes the parts that training does not change, model_index.json and sdcli.json into RUN."""
    memory: Forecast
    """The estimated memory of a step."""
    merged: Mapping[str, str] = field(default_factory=dict)
    """RUN/<part> -> its folder in the merged model of a LoRA, which `write_merged` writes beside the checkpoints."""
    write_merged: Callable[[Path, Networks, Networks], None] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the run started from, by what it is; a resumed run may find them in another place."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts about data and model for --dry-run, the log and the manifests."""


class Session(ABC, Generic[S]):
    """A training run in this process, a context manager: call `prepare`, then `train`; both yield events."""

    command: ClassVar[str]
    kind: ClassVar[type[TrainSettings]]
    presets: ClassVar[Collection[str]] = ()
    """The names that --from-scratch knows."""

    def __init__(self, data: str, run: Path, settings: S, registry: Registry) -> None:
        self.data, self.run, self.settings, self.registry = data, run, with_precision(settings), registry
        self._stack = contextlib.ExitStack()
        trackers = list(settings.report_to) or None
        self.accelerator = make_accelerator(
            self.settings, log_with=trackers, project_dir=str(run) if trackers else None
        )
        if settings.mixed_precision == "auto":
            check_same_precision(self.accelerator, self.settings.mixed_precision)
        self._setup: RunSetup | None = None
        self._checkpoint: CheckpointInfo | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self.accelerator.num_processes > 1 and error is None:
            self.accelerator.end_training()
        elif self.accelerator.num_processes > 1:
            _leave_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the messages."""
        return bool(self.accelerator.is_main_process)

    @abstractmethod
    def build(self) -> Generator[Event, None, RunSetup]:
        """Read the data and load or make the networks; yields progress, returns the setup.

        With several processes the first one fills the caches while the others wait.
        """

    def prepare(self, *, resume: bool, stop: Stop = lambda: None) -> Iterator[Event]:
        """Do everything before the first step; writes nothing into RUN."""
        moved: list[str] = []
        if resume:
            self._checkpoint = newest_checkpoint(self.run)
            moved = self._check_unchanged()
            for path, reason in self._checkpoint.broken:
                yield RunNote(f"skipped {path}: it {reason}; it was not deleted")
        building = self.build()
        while True:
            try:
                yield next(building)
            except StopIteration as end:
                self._setup = end.value
                break
            except NotFound as error:
                if not resume:
                    raise
                raise NotFound(f"{error}. {_MOVED}") from error
            stopped = stop()
            if stopped is not None:
                raise type(stopped)(f"{str(stopped).split(' after')[0]} while preparing; nothing was trained yet")

        if self._checkpoint is not None:
            self._check_same_data(self._checkpoint)
            self._check_same_origin(self._checkpoint, moved)
            yield from self._note_changed_schedule(self._checkpoint)

    @property
    def setup(self) -> RunSetup:
        assert self._setup is not None, "prepare first"
        return self._setup

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None where only --max-hours ends it."""
        return self.settings.steps(self.setup.samples, self.batch)

    @property
    def batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.settings.total_batch_size(self.accelerator.num_processes)

    @property
    def sharding(self) -> str:
        """How the weights are spread; over one process they are not."""
        return self.settings.sharding if self.accelerator.num_processes > 1 else "none"

    def plan(self) -> dict[str, Any]:
        """The run's plan in figures, for --dry-run --json."""
        processes = self.accelerator.num_processes
        return {
            "command": self.command,
            "run": str(self.run),
            "steps": self.steps,
            "done": self._checkpoint.step if self._checkpoint else 0,
            "batch": self.batch,
            "samples": self.setup.samples,
            "steps_per_epoch": round(self.setup.samples / self.batch, 2),
            "processes": processes,
            "device": self.accelerator.device.type,
            "mixed_precision": self.settings.mixed_precision,
            "sharding": self.sharding,
            "memory_bytes": self.setup.memory.peak(processes, self.sharding),
            "memory": self.setup.memory.of_device(processes, self.sharding),
            "memory_bytes_by_devices": {str(count): peaks for count, peaks in self.setup.memory.by_devices(processes)},
            "free_bytes": free_memory(self.accelerator.device),
            **self.setup.facts,
        }

    def plan_lines(self, *, devices: bool = False) -> Iterator[str]:
        """The run's plan in sentences; `devices`: also the memory on other numbers of devices."""
        plan = self.plan()
        steps = f"{plan['steps']:,} steps" if plan["steps"] else f"{self.settings.max_hours:g} hours"
        resumed = f" from step {plan['done']:,}" if plan["done"] else ""
        yield (
            f"{steps}{resumed} of {plan['batch']} samples; an epoch of {plan['samples']:,} samples has "
            f"{plan['steps_per_epoch']:g} steps"
        )
        need, free = plan["memory_bytes"], plan["free_bytes"]
        each = f" on each of {plan['processes']} devices" if plan["processes"] > 1 else ""
        yield f"needs about {need / 2**30:.1f} GiB of memory{each}; {free / 2**30:.1f} GiB are free"
        yield "a step holds " + ", ".join(f"{what} {_gib(size)}" for what, size in plan["memory"].items() if size)
        if self.settings.sharding == "full" and self.sharding == "none":
            yield "--sharding full has one process here, which holds everything; add --num-processes or a launcher"
        if need > free:
            yield (
                "that may not fit: a smaller --train-batch-size, --gradient-checkpointing, --mixed-precision bf16 or "
                "--rank (a LoRA) need less"
            )
        if devices or need > free or plan["processes"] > 1:
            for count, peaks in self.setup.memory.by_devices(plan["processes"]):
                sharded = f", with --sharding full {_gib(peaks['full'])}" if "full" in peaks else ""
                yield f"on {'one device' if count == 1 else f'each of {count} devices'}: {_gib(peaks['none'])}{sharded}"

    def train(self, *, stop: Stop, save: SaveRequest | None = None) -> Iterator[Event]:
        """Write RUN's frozen parts, then train, save and log. Raises what `loop.Trainer.train` raises."""
        settings, setup = self.settings, self.setup
        reporting = None
        if self.is_main:
            self._stack.enter_context(run_lock(self.run))
            if self._checkpoint is None:
                run_folder.begin(self.run, self._recordable(), command=self.command, data=absolute_data(self.data))
                write_frozen_parts(self.run, setup.write_frozen)
            else:
                for name in restore_links(self.run, self._checkpoint.path.name, setup.links, setup.merged):
                    yield RunNote(
                        f"{self.run / name} was a copy, as in a copied run; it is a link again", warning=False
                    )
                run_folder.record(self.run, self._recordable(), command=self.command, data=absolute_data(self.data))
            log = self._stack.enter_context(RunLog.open(self.run))
            reporting = Reporting(log, self.accelerator, trackers=bool(settings.report_to))
        self.accelerator.wait_for_everyone()
        trainer = Trainer(
            setup.task,
            settings,
            self.accelerator,
            self.run,
            Plan(
                steps=self.steps,
                seconds=settings.max_hours * 3600 if settings.max_hours is not None else None,
                validate_every=settings.validation_steps or settings.checkpointing_steps,
                sample_every=settings.sample_every_n_steps or settings.checkpointing_steps,
                checkpoint_every=settings.checkpointing_steps,
                keep=settings.checkpoints_total_limit,
            ),
            links=setup.links,
            merged=setup.merged,
            write_merged=setup.write_merged,
            facts={"command": self.command, "origin": dict(setup.origin), **setup.facts},
            before_checkpoint=reporting.sync if reporting is not None else lambda: None,
        )
        done = trainer.resume(self._checkpoint.path) if self._checkpoint is not None else 0
        start_trackers(self.accelerator, settings)
        owed = agree_on_names(self.accelerator, self._owed(trainer.plan, done) if self.is_main else (), of=WATCHED)
        for event in trainer.train(done=done, stop=stop, save=save, owed=owed):
            if reporting is None:
                yield event
                continue
            if isinstance(event, RunEnd):
                event = dataclasses.replace(event, failed={**event.failed, **reporting.lost})
            notes = reporting.report(event)
            yield event
            yield from notes

    def _owed(self, plan: Plan, done: int) -> list[str]:
        """What was due at the step of the checkpoint, and a signal came before it: "validation", "samples"."""
        if not done:
            return []
        with contextlib.suppress(NotFound, SdcliError):
            log = read_log(self.run)
            made = {
                "validation": any(entry["step"] == done for entry in log.of("validation")),
                "samples": any(entry["step"] == done for entry in log.of("sample")),
            }
            every = {"validation": plan.validate_every, "samples": plan.sample_every}
            return [
                what
                for what in WATCHED
                if not made[what] and (plan.ends_at(done) or done % (every[what] or done + 1) == 0)
            ]
        return []

    def _recordable(self) -> S:
        """The settings for settings.yaml, with absolute paths."""
        registry = self.registry
        names: dict[str, Collection[str]] = dict.fromkeys(("model", "vae", "text_encoder"), registry.models)
        settings = with_absolute_paths(
            self.settings, {**names, "controlnet": registry.controlnets, "from_scratch": self.presets}
        )
        if self._checkpoint is None or "batch" in self._checkpoint.facts:
            return settings
        # of an older checkpoint the samples of a step are known by the settings alone, until the next one is saved
        _, values = run_folder.recorded(self.run, command=self.command, kind=self.kind)
        before = self.kind.model_validate(values)
        return settings.model_copy(update={name: getattr(before, name) for name in run_folder.PRODUCT})

    def _check_unchanged(self) -> list[str]:
        """Raise UsageError for settings that a resumed run cannot change; returns those that name another place now."""
        assert self._checkpoint is not None
        _, values = run_folder.recorded(self.run, command=self.command, kind=self.kind)
        before = self.kind.model_validate(values)
        run_folder.check_unchanged(before, self.settings, batch=(_batch_until(self._checkpoint, before), self.batch))
        return run_folder.moved_since(before, self._recordable())

    def _check_same_origin(self, checkpoint: CheckpointInfo, moved: Sequence[str]) -> None:
        """Raise UsageError if what the run started from has another content now, in the same place or another."""
        before, now = checkpoint.facts.get("origin"), self.setup.origin
        if before is None:  # of an earlier version, which recorded the frozen weights only
            known = {"model", "vae", "text_encoder", "conditioning_data_dir"} if checkpoint.facts.get("base") else set()
            unknown = sorted({*moved} - known)
            if unknown:
                raise UsageError(
                    f"--{unknown[0].replace('_', '-')} names another place than when this run started, and the run, of "
                    "an earlier version, has no digest to compare; if it is the same, enter it in "
                    f"{self.run / run_folder.SETTINGS}"
                )
            return
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            where = f" ({', '.join('--' + name.replace('_', '-') for name in moved)})" if moved else ""
            raise UsageError(
                f"{', '.join(changed)}: not the same as when this run started{where}; a resumed run needs the same, by "
                f"digest. For a new run from this one: -m {self.run} -o ANOTHER"
            )

    def _check_same_data(self, checkpoint: CheckpointInfo) -> None:
        """Raise UsageError if the data or the frozen weights changed since the run started."""
        rules, now_rules = checkpoint.facts.get("sampling", {}), self.setup.facts.get("sampling", {})
        if rules.keys() != now_rules.keys():
            name = min(rules.keys() ^ now_rules.keys()).replace("_", " ")
            raise UsageError(
                f"the samples of {self.data} would be drawn in another way than so far ({name}): the data changed, or "
                f"an older version of sdcli started the run and can resume it. Or start a new run from this one: "
                f"-m {self.run} -o ANOTHER"
            )
        before, now = checkpoint.facts.get("data_fingerprint"), self.setup.facts.get("data_fingerprint")
        if before != now or rules != now_rules:
            raise UsageError(
                f"{self.data} changed since the run started: images or captions were added, removed or edited, or are "
                f"read in another way by this version of sdcli. Restore them, or start a new run from this one: "
                f"-m {self.run} -o ANOTHER"
            )
        for fact, what in LATER_FACTS.items():
            if fact in checkpoint.facts and checkpoint.facts[fact] != self.setup.facts.get(fact):
                raise UsageError(
                    f"{self.data} changed since the run started: {what}. Restore them, or start a new run from this "
                    f"one: -m {self.run} -o ANOTHER"
                )
        base, present = checkpoint.facts.get("base", {}), self.setup.facts.get("base", {})
        changed = sorted(part for part in {*base, *present} if base.get(part) != present.get(part))
        if changed:
            raise UsageError(
                f"{', '.join(changed)}: the weights changed since the run started, which does not train them; restore "
                "them, or start a new run"
            )

    def _note_changed_schedule(self, checkpoint: CheckpointInfo) -> Iterator[Event]:
        """Note if the number of steps changed, and with it the learning rate of all later steps."""
        _, values = run_folder.recorded(self.run, command=self.command, kind=self.kind)
        settings = self.kind.model_validate(values)
        before = settings.steps(self.setup.samples, _batch_until(checkpoint, settings))
        if before != self.steps and not self.settings.lr_scheduler.startswith("constant"):
            yield RunNote(
                f"the learning rate was scheduled over {before:,} steps so far and over {self.steps:,} from now on: "
                f"--lr-scheduler {self.settings.lr_scheduler} depends on the number of steps"
            )


_MOVED = (
    "If it was moved, say where it is now: sdcli ... NEW_DATA -o RUN --resume -m NEW_MODEL; it is compared by digest "
    "and recorded in RUN/settings.yaml"
)


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"


def _batch_until(checkpoint: CheckpointInfo, settings: TrainSettings) -> int:
    """Samples of a step before a checkpoint; older checkpoints recorded the number of processes instead."""
    batch = checkpoint.facts.get("batch")
    return settings.total_batch_size(checkpoint.facts.get("processes", 1)) if batch is None else batch


def _leave_group() -> None:
    """Leave a process group without waiting for the others, which may wait for this process in a collective call."""
    import torch.distributed as distributed

    if distributed.is_initialized() and os.environ.get(MARK):
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()
