"""RUN, the folder of a training run, and its settings.yaml.

RUN/settings.yaml                 the resolved settings; `--config RUN/settings.yaml` repeats the run
RUN/model_index.json, sdcli.json  the components of the model, and its defaults for generation
RUN/vae, tokenizer, scheduler, …  the parts that training does not change
RUN/unet -> current/unet(_ema)    the trained parts; RUN/current -> checkpoint-<step>, replaced at each checkpoint
RUN/merged -> merged-<step>-…     of a LoRA: the network with the LoRA merged into it; RUN/unet -> merged/unet(_ema)
RUN/raw/                          with --use-ema: the same model with the weights as trained, not averaged
RUN/checkpoint-<step>/            see state/checkpoint.py
RUN/log.jsonl, RUN/samples/       the log, and sample sheets
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sdcli.errors import CannotWrite, NotFound, UsageError
from sdcli.io.files import expanded, write_whole
from sdcli.io.yaml_files import read_yaml
from sdcli.training.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)
CURRENT = "current"
"""The link in RUN to its newest checkpoint."""
SETTINGS = "settings.yaml"
MAY_CHANGE = frozenset(
    {
        "max_train_steps",
        "num_train_epochs",
        "max_hours",
        "device",
        "sharding",
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
"""Settings that a resumed run may change: they affect its length and its output, but not the training itself."""
PRODUCT = frozenset({"train_batch_size", "gradient_accumulation_steps", "num_processes"})
"""Settings that may change as long as their product, the samples of a step, stays the same."""


LOCATIONS = frozenset(
    {
        "model",
        "vae",
        "text_encoder",
        "controlnet",
        "from_scratch",
        "lpips",
        "teacher",
        "conditioning_data_dir",
    }
)
"""Settings that name a place; in a resumed run it may be another one with the same content, compared by digest."""


def check_free(run: Path) -> None:
    """Check that a new run can start in a folder; called early, too, before an hour of encoding is lost.

    Raises UsageError for a folder with other content, and CannotWrite.
    """
    nearest = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is a file" if not nearest.is_dir() else "is not writable"
        raise CannotWrite(f"cannot write into {run}: {nearest} {reason}")
    if not run.is_dir():
        return
    if any(run.glob("checkpoint-*")):
        raise UsageError(
            f"{run} already has a training run; continue it with --resume, or use another -o for a new one"
        )
    others = [entry.name for entry in run.iterdir() if not entry.name.startswith(".")]
    if others and not (run / SETTINGS).exists():
        raise UsageError(f"{run} has other content ({', '.join(sorted(others)[:3])}); use a new folder with -o")


def begin(run: Path, settings: TrainSettings, *, command: str, data: str) -> None:
    """Write the settings of a new run into RUN, which may hold a run without checkpoints.

    Raises UsageError for a folder with other content, and CannotWrite.
    """
    check_free(run)
    if (run / CURRENT).is_dir() and not (run / CURRENT).is_symlink():
        raise CannotWrite(f"{run / CURRENT} is a folder, where a run has a link to its newest checkpoint; move it away")
    record(run, settings, command=command, data=data)


def record(run: Path, settings: TrainSettings, *, command: str, data: str) -> None:
    """Write settings.yaml, unless it has these settings already. Raises CannotWrite."""
    values = {"command": command, "data": data, **settings.model_dump(mode="json")}
    values = {key: value for key, value in values.items() if value is not None}
    with contextlib.suppress(UsageError, NotFound):
        if read_yaml(run / SETTINGS) == values:
            return
    write_whole(run / SETTINGS, yaml.safe_dump(values, sort_keys=False).encode(), overwrite=True)


def recorded(run: Path, *, command: str, kind: type[TrainSettings]) -> tuple[str, dict[str, Any]]:
    """The data and the settings that a run started with. Raises NotFound and UsageError."""
    if not (run / SETTINGS).is_file():
        raise NotFound(f"{run} has no training run to resume: it has no {SETTINGS}")
    values = read_yaml(run / SETTINGS)
    started_by = values.pop("command", command)
    if started_by != command:
        raise UsageError(f"{run} was started by sdcli {started_by}, not by {command}")
    data = str(values.pop("data", ""))
    unknown = set(values) - set(kind.model_fields)
    if unknown:
        raise UsageError(f"{run / SETTINGS}: this version of sdcli has no setting {min(unknown)!r}")
    return data, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def with_recorded_precision(values: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resumed run, where `--mixed-precision auto` is what the run began with, on any machine."""
    if values.get("mixed_precision") == "auto" and "mixed_precision" in before:
        return {**values, "mixed_precision": before["mixed_precision"]}
    return values


def check_unchanged(before: TrainSettings, now: TrainSettings, *, batch: tuple[int, int]) -> None:
    """Raise UsageError for settings that would change the run. `batch`: the samples of a step before and now.

    What stands in another place than before (`moved_since`) is compared when it is loaded.
    """
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        moved = name in LOCATIONS and (name == "model" or (old is None) == (new is None))
        if old != new and not moved and name not in MAY_CHANGE | PRODUCT:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} was {old} when this run started; a resumed run cannot change it (now {new})")
    if batch[0] != batch[1]:
        raise UsageError(
            f"a step of this run has {batch[0]} samples, but would now have {batch[1]}: --train-batch-size x "
            "--gradient-accumulation-steps x processes must stay the same"
        )


def moved_since(before: TrainSettings, now: TrainSettings) -> list[str]:
    """The settings that name another place than before."""
    return sorted(
        name for name in LOCATIONS & set(type(now).model_fields) if getattr(before, name) != getattr(now, name)
    )


def with_absolute_paths(settings: S, names: Mapping[str, Collection[str]]) -> S:
    """The settings with absolute paths, so that the run can be resumed from any folder.

    `names`: for each setting the values that are names, not paths, such as the models of the registry.
    """
    changes: dict[str, Any] = {}
    for name in (LOCATIONS | {"cache_dir"}) & set(type(settings).model_fields):
        value = getattr(settings, name)
        if isinstance(value, Path):
            changes[name] = absolute(value)
        elif value is not None and value not in names.get(name, ()) and os.path.exists(expanded(value)):
            changes[name] = str(absolute(value))
    return settings.model_copy(update=changes)


def absolute_data(data: str) -> str:
    """DATA with an absolute path, if it is a path or a pattern and not a data set of the hub."""
    if os.path.lexists(expanded(data)) or (re.search(r"[*?\[{]", data) and "://" not in data):
        return str(absolute(data))
    return data


def absolute(path: str | Path) -> Path:
    """An absolute path without `~` and `..`; links stay as they are."""
    return Path(os.path.abspath(expanded(path)))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically and durably, replacing an existing one."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), overwrite=True)
