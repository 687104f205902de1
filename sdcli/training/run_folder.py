"""RUN, the folder of a training run: its settings, its frozen parts, and the links that make it a model folder.

RUN/settings.yaml                 the resolved settings; `--config RUN/settings.yaml` repeats the run
RUN/model_index.json, sdcli.json  what kind of model this is, and how it likes to generate
RUN/vae, tokenizer, scheduler, …  the parts that training leaves alone
RUN/unet -> current/unet(_ema)    the trained parts; RUN/current -> checkpoint-<step>, swapped at each checkpoint
RUN/raw/                          with --use-ema: the same model with the weights as trained, not averaged
RUN/checkpoint-<step>/            see checkpoint.py
RUN/log.jsonl, RUN/samples/       what happened, and sample sheets
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdcli.errors import CannotWrite, NotFound, UsageError
from sdcli.io.files import write_whole
from sdcli.models.registry import read_yaml
from sdcli.training.settings import TrainSettings

SETTINGS = "settings.yaml"
MAY_CHANGE = frozenset(
    {
        "max_train_steps",
        "num_train_epochs",
        "max_hours",
        "device",
        "dataloader_num_workers",
        "cache_dir",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "sample_every_n_steps",
        "sample_prompts",
        "sample_steps",
        "log_steps",
        "report_to",
    }
)
"""Settings that a resumed run may be given anew: they change how far it goes and what is shown, not what is learnt."""
TRADED = frozenset({"train_batch_size", "gradient_accumulation_steps", "num_processes"})
"""May change together as long as their product, the samples of a step, stays."""


def check_free(run: Path) -> None:
    """Refuse a folder that no new run can begin in; asked again early, before an hour of encoding is lost.

    Raises UsageError where something else is there, and CannotWrite.
    """
    nearest = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is a file" if not nearest.is_dir() else "may not be written into"
        raise CannotWrite(f"cannot write into {run}: {nearest} {reason}")
    if not run.is_dir():
        return
    if any(run.glob("checkpoint-*")):
        raise UsageError(f"{run} holds a training run already; --resume goes on with it, another -o starts a new one")
    others = [entry.name for entry in run.iterdir() if not entry.name.startswith(".")]
    if others and not (run / SETTINGS).exists():
        raise UsageError(
            f"{run} holds something else already ({', '.join(sorted(others)[:3])}); name a new folder with -o"
        )


def begin(run: Path, settings: TrainSettings, *, command: str, data: str) -> None:
    """Write the settings of a new run into RUN, which may be left over from a run without a checkpoint.

    Raises UsageError where something else is there, and CannotWrite.
    """
    check_free(run)
    values = {"command": command, "data": data, **settings.model_dump(mode="json")}
    text = yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
    write_whole(run / SETTINGS, text.encode(), overwrite=True)


def recorded(run: Path, *, command: str, kind: type[TrainSettings]) -> tuple[str, dict[str, Any]]:
    """The data and the settings that a run was begun with. Raises NotFound and UsageError."""
    if not (run / SETTINGS).is_file():
        raise NotFound(f"{run} holds no training run to resume: there is no {SETTINGS}")
    values = read_yaml(run / SETTINGS)
    begun_by = values.pop("command", command)
    if begun_by != command:
        raise UsageError(f"{run} was begun by sdcli {begun_by}, not by {command}")
    data = str(values.pop("data", ""))
    unknown = set(values) - set(kind.model_fields)
    if unknown:
        raise UsageError(f"{run / SETTINGS}: no setting {min(unknown)!r} in this sdcli")
    return data, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_unchanged(before: TrainSettings, now: TrainSettings, *, batch: tuple[int, int]) -> None:
    """Refuse a resume that would not go on with the same run. `batch`: the samples of a step until here, and now."""
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        if old != new and name not in MAY_CHANGE | TRADED:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} was {old} when this run began; a resumed run cannot change it (now {new})")
    if batch[0] != batch[1]:
        raise UsageError(
            f"a step of this run has {batch[0]} samples, now it would have {batch[1]}: --train-batch-size x "
            "--gradient-accumulation-steps x processes must stay the same"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A small JSON file, whole and durable, replaced where it exists."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), overwrite=True)
