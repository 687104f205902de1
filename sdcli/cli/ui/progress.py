"""The engine's events as a progress bar on a terminal, or as plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sdcli.cli.ui.console import Console, plain_terminal, printable
from sdcli.cli.ui.terminal_images import HalfBlocks

if TYPE_CHECKING:
    from sdcli.generation.events import Phase, Progress

PHASES = {
    "load": "loading",
    "encode": "encoding",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
    "explain": "explaining",
}
HEARTBEAT = 10.0
"""Seconds between two plain lines of one phase."""
REDRAWN = 0.5
"""Seconds between two drawings with an image, which takes some ten milliseconds."""

T = TypeVar("T")


class ProgressDisplay:
    """Shows phases and denoising steps on stderr; shows nothing with -q. A context manager.

    With `images` there is room for one above the bar, and the whole is drawn anew less often.
    """

    def __init__(self, console: Console, *, images: bool = False) -> None:
        self._console, self._images = console, images
        self._drawn = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._spoke = 0.0
        self._began = 0.0

    def __enter__(self) -> Self:
        if not self._console.quiet and not plain_terminal():
            from rich.progress import TimeRemainingColumn

            self._bar = rich_bar("{task.fields[rate]}", TimeRemainingColumn(), auto_refresh=not self._images)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, phase: Phase) -> None:
        """A new phase begins."""
        text = f"{PHASES[phase.name]} {phase.detail}".rstrip()
        self._began = self._spoke = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(printable(text), total=phase.steps or None, rate="")
        elif phase.name in ("load", "denoise"):
            self._console.note(f"{text}{f', {phase.steps} steps' if phase.steps else ''}")

    def step(self, progress: Progress) -> None:
        """One denoising step is done."""
        now = time.monotonic()
        done = progress.index + 1
        rate = done / max(now - self._began, 1e-9)
        if self._bar is not None:
            drawn = self._images and now - self._drawn > REDRAWN
            self._drawn = now if drawn else self._drawn
            rated = f"{rate:.2f} it/s"
            self._bar.update(self._task, completed=done, total=progress.count, rate=rated, refresh=drawn)
        elif now - self._spoke > HEARTBEAT:
            self._spoke = now
            left = (progress.count - done) / rate
            self._console.note(f"step {done} of {progress.count}, {rate:.2f} it/s, {left:.0f} s left")

    def image(self, image: Any) -> None:
        """How the images look now, above the bar."""
        self._bar.image = HalfBlocks(image)
        self._bar.refresh()

    def show(self, image: Any) -> None:
        """Anything that rich can draw, to stay on stderr."""
        if self._bar is not None:
            self._bar.image = None
            self._bar.refresh()  # else rich would draw the old one once more, below this
            self._bar.console.print(image)
        else:
            from rich.console import Console as RichConsole

            RichConsole(stderr=True).print(image)


def rich_bar(*columns: Any, auto_refresh: bool = True) -> Any:
    """rich's progress on stderr: description, bar, count, and then these columns (rich's, or format strings)."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    class Bar(RichProgress):
        image: Any = None

        def get_renderables(self) -> Iterable[Any]:
            yield from [self.image] if self.image is not None else []
            yield from super().get_renderables()

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        console=RichConsole(stderr=True),
        transient=True,
        auto_refresh=auto_refresh,
        redirect_stdout=sys.stdout.isatty(),  # rich would print results on stderr, too, when stdout is a file or a pipe
    )


def shown_progress(seen: Iterable[T], total: int, console: Console) -> Iterator[T]:
    """The same, with progress on stderr as it is gone through: a bar, or a plain line every ten seconds."""
    if console.quiet or plain_terminal():
        spoke = time.monotonic()
        for done, one in enumerate(seen, start=1):
            yield one
            if time.monotonic() - spoke > HEARTBEAT:
                spoke = time.monotonic()
                console.note(f"looked at {done:,} of {total:,} images")
        return
    from rich.progress import TimeRemainingColumn

    with rich_bar(TimeRemainingColumn()) as bar:
        yield from bar.track(seen, total=total, description="looking at images")
