"""Every failure a user can act on: one class per exit code, each raised with the sentence that is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class SdcliError(Exception):
    """A failure told in one sentence. `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(SdcliError):
    """An option, a request or a file of requests that cannot be honoured as written."""

    exit_code = 2


class NotFound(SdcliError):
    """A model, or a file that should be read, is not there."""

    exit_code = 3


class Offline(SdcliError):
    """Something must be downloaded, and there is no network or it was forbidden."""

    exit_code = 4


class OutOfMemory(SdcliError):
    """Memory ran out, and every fall-back was tried."""

    exit_code = 5


class BadOutput(SdcliError):
    """The numbers went wrong (NaN, an all-black image), or an image is not what it should be."""

    exit_code = 6


class SomeFailed(SdcliError):
    """Some items of a batch failed and the others are done."""

    exit_code = 7


class CannotWrite(SdcliError):
    """The output could not be written: disk full, no permission, or the file exists already."""

    exit_code = 8


class Interrupted(BaseException):
    """Stopped by SIGINT (Ctrl-C). Not an error: no `except SdcliError` and no `except Exception` may swallow it."""

    exit_code = 130


class Terminated(Interrupted):
    """Stopped by SIGTERM."""

    exit_code = 143


Stop = Callable[[], Interrupted | None]
"""Whether, and why, to stop after the item in hand."""


class BadWeights(SdcliError):
    """A model's files are there, and are damaged, incomplete or of another kind than expected."""


class BadImage(SdcliError):
    """An input image cannot be read, or is too large to be read safely."""


class BadLatents(SdcliError):
    """A latent file cannot be read, or does not fit the model's VAE."""


def stop_if_asked(stop: Stop) -> None:
    """Raise what `stop` answers, if anything."""
    reason = stop()
    if reason is not None:
        raise reason


def first_line(error: BaseException) -> str:
    """The first line that a library's exception says anything in, or else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def same_for_all(errors: Sequence[SdcliError], *, of: int) -> bool:
    """Whether all of a batch failed for one reason, which then is the whole run's."""
    return len(errors) == of and len({(type(error), str(error)) for error in errors}) == 1


def raise_for(errors: Sequence[SdcliError], *, of: int) -> None:
    """After a batch of `of` images: the one error of them all, or, where others may be done, SomeFailed."""
    if same_for_all(errors, of=of):
        raise errors[0]
    if errors:
        raise SomeFailed(f"{len(errors)} of {of} images failed")


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "another failure (a damaged model file, an unreadable image)",
    2: "wrong usage: an option or a request that cannot be honoured",
    3: "a model or a file was not found",
    4: "offline, and what is needed is not in the cache",
    5: "out of memory after every fall-back",
    6: "bad output: NaN or all black, an image that was flagged or did not verify, or a PSNR below --min-psnr",
    7: "some items of a batch failed, the others are done",
    8: "cannot write the output",
    130: "interrupted (Ctrl-C); finished images are kept",
    143: "terminated (SIGTERM); finished images are kept",
}
"""What each exit code means; the README's table and `sdcli --help` are made from it."""
