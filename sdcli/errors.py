"""Errors that a user can act on: a class per exit code, raised with the sentence that the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class SdcliError(Exception):
    """Base of all errors; the message is one sentence, `exit_code` the exit code of the process."""

    exit_code = 1


class UsageError(SdcliError):
    """An invalid option, request or file of requests."""

    exit_code = 2


class NotFound(SdcliError):
    """A model or an input file does not exist."""

    exit_code = 3


class Offline(SdcliError):
    """A download is needed, but the network is missing or not allowed."""

    exit_code = 4


class OutOfMemory(SdcliError):
    """Out of memory after every fallback."""

    exit_code = 5


class BadOutput(SdcliError):
    """A bad result: NaN, an all-black image, or an image that differs from the expected one."""

    exit_code = 6


class SomeFailed(SdcliError):
    """Some items of a batch failed; the others are done."""

    exit_code = 7


class CannotWrite(SdcliError):
    """The output cannot be written: disk full, no permission, or the file exists."""

    exit_code = 8


class Interrupted(BaseException):
    """Stopped by SIGINT (Ctrl-C). Not an error: no `except SdcliError` and no `except Exception` may swallow it."""

    exit_code = 130


class Terminated(Interrupted):
    """Stopped by SIGTERM."""

    exit_code = 143


Stop = Callable[[], Interrupted | None]
"""Returns the reason to stop after the current item, or None."""


class BadWeights(SdcliError):
    """Model files are damaged, incomplete or of an unexpected kind."""


class BadImage(SdcliError):
    """An input image cannot be read, or is too large."""


class BadLatents(SdcliError):
    """A latent file cannot be read, or does not match the VAE of the model."""


def stop_if_asked(stop: Stop) -> None:
    """Raise the reason to stop, if there is one."""
    reason = stop()
    if reason is not None:
        raise reason


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception of a library, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def same_for_all(errors: Sequence[SdcliError], *, of: int) -> bool:
    """Whether all `of` items of a batch failed with the same error, which is then that of the whole run."""
    return len(errors) == of and len({(type(error), str(error)) for error in errors}) == 1


def raise_for(errors: Sequence[SdcliError], *, of: int) -> None:
    """After a batch of `of` images: raise their common error, or SomeFailed if only some failed."""
    if same_for_all(errors, of=of):
        raise errors[0]
    if errors:
        raise SomeFailed(f"{len(errors)} of {of} images failed")


def in_own_words(complaint: str) -> str:
    """A message of pydantic's without the name of an exception, to stand behind the name of a field."""
    return complaint.removeprefix("Value error, ").removeprefix("Input ")


def packed_error(error: SdcliError) -> tuple[list[str], str]:
    """An error as plain values: the names of its classes, the most particular first, and its sentence."""
    return [kind.__name__ for kind in type(error).__mro__], str(error)


def unpacked_error(packed: tuple[list[str], str]) -> SdcliError:
    """The error, of the most particular of its classes that is in this module: those decide the exit code."""
    names, sentence = packed
    kind = next(kind for name in names if isinstance(kind := globals().get(name), type))
    return kind(sentence) if issubclass(kind, SdcliError) else SdcliError(sentence)


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "another error (such as a damaged model file or an unreadable image)",
    2: "wrong usage: an invalid option or request",
    3: "a model or a file was not found",
    4: "offline: a model is not in the cache",
    5: "out of memory after every fallback",
    6: "bad output: NaN, all black, flagged by the safety checker, not verified, or a PSNR below --min-psnr",
    7: "some items of a batch failed; the others are done",
    8: "cannot write the output",
    130: "interrupted (Ctrl-C); finished images and checkpoints are kept",
    141: "nobody reads stdout any more (such as | head -1); finished images are kept",
    143: "terminated (SIGTERM; in training also SIGHUP and SIGUSR2); finished images and checkpoints are kept",
}
"""Meaning of each exit code, for `sdcli --help` and docs/cli.md."""
