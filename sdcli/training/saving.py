"""Saves the checkpoints of a run and what stands beside them; all processes of the run take part together.

Without --sharding the first process writes everything. With it the first process makes the folder, writes the model's
files from tensors that it asks the others for, every process writes its rows of the optimizers' states, and the first
one writes the manifest and renames the folder, as always. What fails in one process fails in all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from sdcli.errors import CannotWrite, SdcliError
from sdcli.training.events import CheckpointSaved, Event, RunNote
from sdcli.training.orders import agree_on_failure
from sdcli.training.sharding import Sharding
from sdcli.training.state.checkpoint import Report, save_checkpoint
from sdcli.training.state.disk import is_disk_error, strerror
from sdcli.training.state.manifest import digests_of
from sdcli.training.state.merged_model import is_merged, write_merged
from sdcli.training.state.model_links import link_model_folder
from sdcli.training.state.sharded_files import shard_name
from sdcli.training.state.training_state import TrainingState
from sdcli.training.task import Networks, Task

T = TypeVar("T")
FAILED = "another process could not write its part of the checkpoint"


@dataclass(frozen=True)
class Saving:
    """Writes into the folder `run` of a run."""

    task: Task
    accelerator: Accelerator
    state: TrainingState
    sharding: Sharding | None
    run: Path
    links: Mapping[str, str] = field(default_factory=dict)
    """RUN/<part> -> its folder or file in a checkpoint; the links make RUN a model folder."""
    merged: Mapping[str, str] = field(default_factory=dict)
    """The same for parts that `write_merged` writes, which are in no checkpoint."""
    write_merged: Callable[[Path, Networks, Networks], None] | None = None
    """Writes the networks with their LoRAs merged into them, from the networks and their averages."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for each checkpoint's manifest."""
    keep: int | None = None
    before: Callable[[], None] = lambda: None
    """Called before each checkpoint, in the first process."""
    failed: Counter[str] = field(default_factory=Counter)
    """How many merged models failed."""

    def checkpoint(self, done: int) -> Iterator[Event]:
        """Save the checkpoint of a step. Raises what `save_checkpoint` raises, in every process."""
        began = time.monotonic()
        path = self.run / f"checkpoint-{done}"
        notes: list[str] = []

        def report(path: Path, reason: str) -> None:
            notes.append(f"{path} {reason}; it was not deleted")

        if self.sharding is not None:
            self._save_together(self.sharding, done, report)
        elif self.accelerator.is_main_process:
            self._save(done, lambda folder: self._write(folder, done), report)
        seconds = time.monotonic() - began
        yield from self.merge(done)
        self.accelerator.wait_for_everyone()
        for note in notes:
            yield RunNote(note)
        yield CheckpointSaved(done, path, seconds)

    def merge(self, done: int) -> Iterator[Event]:
        """Write the merged model of a LoRA, which only people need: what fails is a warning, made good by a resume."""
        if self.write_merged is None:
            return
        if self.accelerator.is_main_process:
            with self.helped():
                yield from self._merge(self.run / f"checkpoint-{done}", self.write_merged)
        else:
            self.help()

    def helped(self) -> AbstractContextManager[None]:
        """Inside the block the first process may ask the others for whole tensors; they are in `help` meanwhile."""
        return nullcontext() if self.sharding is None else self.sharding.helped()

    def help(self) -> None:
        if self.sharding is not None:
            self.sharding.help()

    def whole(self, networks: Networks) -> Networks:
        """Networks or averages with whole weights, inside of `helped`."""
        return networks if self.sharding is None else self.sharding.whole(networks)

    def _merge(self, checkpoint: Path, write: Callable[[Path, Networks, Networks], None]) -> Iterator[Event]:
        if is_merged(self.run, checkpoint, self.merged):
            return
        try:
            networks, averages = self.whole(self.task.networks), self.whole(self.state.averages)
            write_merged(self.run, checkpoint, lambda folder: write(folder, networks, averages), self.merged)
        except SdcliError as error:
            self.failed["merged models"] += 1
            yield RunNote(f"{error}; the run goes on, and --resume writes it again")

    def _save(self, done: int, write: Callable[[Path], Mapping[str, str] | None], report: Report) -> None:
        self.before()
        save_checkpoint(self.run, done, write, facts=self.facts, keep=self.keep, report=report)
        link_model_folder(self.run, self.links)

    def _write(self, folder: Path, done: int) -> None:
        self.task.save(folder, self.task.networks, self.state.averages)
        self.state.save(folder, done=done, scaler=self.accelerator.scaler)

    # With --sharding

    def _save_together(self, sharding: Sharding, done: int, report: Report) -> None:
        """Save a checkpoint to which every process writes its rows."""
        error: Exception | None = None
        announced = False
        try:
            if self.accelerator.is_main_process:

                def write(folder: Path) -> dict[str, str]:
                    nonlocal announced
                    announced = True
                    _announce(folder)
                    return self._write_together(sharding, folder, done)

                self._save(done, write, report)
            else:
                folder = _announce(None)
                if folder is not None:
                    self._write_together(sharding, folder, done)
        except Exception as problem:
            error = problem
            if self.accelerator.is_main_process and not announced:
                _announce(None)
        self._raise_together(error)

    def _write_together(self, sharding: Sharding, folder: Path, done: int) -> dict[str, str]:
        """Fill the folder of a checkpoint; each step fails in every process or in none.

        Returns the SHA-256 of the files with rows, each computed by the process that wrote it.
        """
        states = self._together(self.state.checked)
        self._together(lambda: self._write_networks(sharding, folder))
        self._together(
            lambda: self.state.save_optimizers(
                folder, states, done=done, scaler=self.accelerator.scaler, first=self.accelerator.is_main_process
            )
        )
        own = self._together(lambda: self._digests(folder))
        return {name: digest for some in gather_object([own]) for name, digest in some.items()}

    def _digests(self, folder: Path) -> dict[str, str]:
        """The SHA-256 of the files that this process wrote its rows into."""
        shards = f"state/*/{shard_name(self.accelerator.process_index)}*"
        return digests_of(folder, {str(path.relative_to(folder)): path.stat().st_size for path in folder.glob(shards)})

    def _write_networks(self, sharding: Sharding, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            sharding.help()
            return
        with sharding.helped():
            self.task.save(folder, sharding.views(), self.state.averages)
            self.state.save_networks(folder)

    def _together(self, work: Callable[[], T]) -> T:
        """Do this process's part; raises its error, or that another process has one."""
        error: Exception | None = None
        try:
            result = work()
        except Exception as problem:
            error = CannotWrite(f"cannot write {self.run}: {strerror(problem)}") if is_disk_error(problem) else problem
        self._raise_together(error)
        return result

    def _raise_together(self, error: Exception | None) -> None:
        """Raise this process's error, or that another process has one."""
        failure = agree_on_failure(self.accelerator, error, other=FAILED)
        if error is not None:
            raise error
        if failure is not None:
            raise failure


def _announce(folder: Path | None) -> Path | None:
    """The folder that the first process gives, where all write; None if there is none."""
    message = broadcast_object_list([None if folder is None else str(folder)])
    return None if message[0] is None else Path(message[0])
