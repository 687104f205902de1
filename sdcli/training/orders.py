"""What a run is asked to do between its steps: to stop, to save now, to end its samples; all processes agree on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcli.errors import Interrupted, SdcliError, Terminated, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class SaveRequest:
    """A wish for a checkpoint at the next step, such as SIGUSR1; the loop takes it back once it has saved."""

    wanted: bool = False


@dataclass(frozen=True)
class Orders:
    """What all processes do after this step."""

    reason: Interrupted | None = None
    """Why the run stops; None to go on."""
    late: bool = False
    """Whether the run's time is over."""
    save: bool = False
    """Whether a checkpoint was asked for."""


def agree(accelerator: Accelerator, mine: Orders) -> Orders:
    """The orders of all processes together: the strongest reason to stop, and what any of them was asked."""
    if accelerator.num_processes == 1:
        return mine
    code, late, save = _strongest(accelerator, [_code(mine.reason), int(mine.late), int(mine.save)])
    reason = mine.reason
    if reason is None and code:
        reason = (Terminated if code == Terminated.exit_code else Interrupted)("stopped")
    return Orders(reason, bool(late), bool(save))


def agree_on_failure(
    accelerator: Accelerator, mine: Exception | None, *, other: str = "another process could not prepare its samples"
) -> SdcliError | None:
    """The error of any process while it prepared its samples, as a sentence; None where all of them have theirs.

    `other` is the sentence of a process that has none itself. For other work than samples it is the only one to use.
    """
    own = None if mine is None else _as_sentence(mine)
    if accelerator.num_processes == 1:
        return own
    (code,) = _strongest(accelerator, [0 if own is None else own.exit_code])
    if own is None and code:
        own = SdcliError(other)
        own.exit_code = code
    return own


def agree_on_names(accelerator: Accelerator, mine: Collection[str], *, of: Sequence[str]) -> list[str]:
    """Those of the names `of` that any process has."""
    if accelerator.num_processes == 1:
        return [name for name in of if name in mine]
    chosen = _strongest(accelerator, [int(name in mine) for name in of])
    return [name for name, one in zip(of, chosen, strict=True) if one]


def _as_sentence(error: Exception) -> SdcliError:
    if isinstance(error, SdcliError):
        return error
    sentence = SdcliError(f"the samples of the next step cannot be prepared: {first_line(error)}")
    sentence.__cause__ = error
    return sentence


def _code(reason: Interrupted | None) -> int:
    return reason.exit_code if reason is not None else 0


def _strongest(accelerator: Accelerator, values: list[int]) -> list[int]:
    """The largest of each value over all processes."""
    import torch

    mine = torch.tensor(values, device=accelerator.device)
    strongest: list[int] = accelerator.gather(mine[None]).amax(dim=0).tolist()
    return strongest
