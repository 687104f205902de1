"""How `sdcli generate` finds a warm worker, or starts one, and does without where none fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdcli.cli.ui.console import Console
from sdcli.errors import CannotWrite, UsageError
from sdcli.generation.events import Event
from sdcli.generation.resolve.jobs import ResolvedJob
from sdcli.generation.settings import RunSettings
from sdcli.generation.writer import Writer
from sdcli.server.warm.place import Place, Unsafe, possible

if TYPE_CHECKING:
    from sdcli.server.warm.client import Worker

OPT_OUT = "SDCLI_NO_SERVER"
"""The environment variable that has the effect of --no-server."""
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """The seconds of `90s`, `15m`, `2h` or a plain number of seconds. Raises UsageError."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 7 * 24 * 3600:
        raise UsageError(f"--keep-warm takes a time such as 90s, 15m or 2h, up to a week; not {text!r}")
    return seconds


def check_keep_warm() -> None:
    """Raise UsageError where --keep-warm can have no effect."""
    if os.environ.get(OPT_OUT):
        raise UsageError(f"--keep-warm has no effect while {OPT_OUT} is set")
    if not possible():
        raise UsageError("--keep-warm needs Unix sockets, which this system does not have")


def generate_events(
    jobs: Sequence[ResolvedJob],
    run: RunSettings,
    writer: Writer,
    console: Console,
    *,
    use: bool,
    keep: float | None,
    **options: Any,
) -> Iterator[Event]:
    """The events of `service.generate`, by a warm worker if one fits and `use` allows it; else in this process.

    `keep` starts a worker for so many seconds where there is none.
    """
    worker = _worker(run, keep, console) if use and not os.environ.get(OPT_OUT) else None
    if worker is None:
        from sdcli.generation.model_cache import ModelCache
        from sdcli.generation.service import generate

        options.pop("previews")
        yield from generate(jobs, ModelCache(run), writer, **options)
        return
    from sdcli.server.warm.client import generate as generate_warm

    console.detail(f"generating with the warm worker, process {worker.pid}")
    yield from generate_warm(jobs, run, writer, worker, note=console.note, keep=keep, **options)


def _worker(run: RunSettings, keep: float | None, console: Console) -> Worker | None:
    place = Place(run.device, run.dtype)
    found = place.exists()
    if not found and keep is None:
        return None
    from sdcli.server.warm.client import NoWorker, connect, without

    outdated = False
    if found:
        try:
            return connect(place, retire=keep is not None)
        except NoWorker as reason:
            if keep is None or not reason.replaceable:
                console.note(without(str(reason)))
                return None
            outdated = reason.outdated
    assert keep is not None
    from sdcli.server.warm.process import BEGIN, start

    try:
        start(place, keep, instead=outdated)
        return connect(place, seconds=BEGIN)
    except (NoWorker, CannotWrite, Unsafe) as reason:
        console.note(without(str(reason)))
        return None
