"""The precision of a run whose settings say `--mixed-precision auto`.

It never depends on a measurement, so that the same command gives the same weights on one machine. A run records the
choice in its settings.yaml, and keeps it wherever it is resumed.
"""

from __future__ import annotations

from typing import TypeVar

from accelerate import Accelerator

from sdcli.errors import UsageError
from sdcli.io.devices import PRECISIONS, pick_device, pick_precision
from sdcli.training.orders import agree_on_names
from sdcli.training.settings import Precision, TrainSettings

S = TypeVar("S", bound=TrainSettings)


def with_precision(settings: S) -> S:
    """The settings with a precision in place of `auto`. Raises UsageError for a device that does not exist."""
    if settings.mixed_precision != "auto":
        return settings
    return settings.model_copy(update={"mixed_precision": pick_precision(pick_device(settings.device))})


def check_same_precision(accelerator: Accelerator, chosen: Precision) -> None:
    """Raise UsageError, in every process, where `auto` is not the same for the processors of all processes."""
    if len(agree_on_names(accelerator, {chosen}, of=PRECISIONS)) > 1:
        raise UsageError(
            "--mixed-precision auto is bf16 for some of the processes and no for others, because their processors "
            "differ; choose one of them"
        )
