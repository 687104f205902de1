"""Progress on stderr: a bar on a terminal, a plain line every ten seconds elsewhere, nothing with -q."""

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

HEARTBEAT = 10.0
"""Seconds between two plain lines of one task."""

T = TypeVar("T")


class ProgressBar:
    """One task at a time: its description, a bar, a count, a note, and perhaps the remaining time. A context manager.

    With `sizes` the count is bytes, shown with a speed. A terminal can show an image above the bar and text below it.
    Without `auto_refresh` the bar is drawn only when an update says so.
    """

    def __init__(
        self, console: Console, *, sizes: bool = False, remaining: bool = True, auto_refresh: bool = True
    ) -> None:
        self._console = console
        self._sizes, self._remaining, self._auto_refresh = sizes, remaining, auto_refresh
        self._bar: Any = None
        self._task: Any = None
        self._printed = 0.0

    def __enter__(self) -> Self:
        if not self._console.quiet and not plain_terminal():
            self._bar = _rich_bar(self._sizes, self._remaining, self._auto_refresh)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, description: str, total: int | None = None, *, line: str | None = None) -> None:
        """Begin a task in place of the last one; without a terminal print `line`, if there is one."""
        self._printed = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.refresh()  # the last state of a short task
                self._bar.remove_task(self._task)
            self._bar.footer = ""
            self._task = self._bar.add_task(printable(description), total=total, note="")
        elif line is not None:
            self._console.note(line)

    def update(
        self,
        done: int,
        total: int | None = None,
        *,
        line: str,
        always: bool = False,
        note: str = "",
        footer: str = "",
        description: str | None = None,
        refresh: bool = False,
    ) -> None:
        """`done` of `total` is done. Without a terminal print `line`, every ten seconds or `always`."""
        if self._bar is not None:
            changes: dict[str, Any] = {"total": total} if total is not None else {}
            changes |= {"description": printable(description)} if description is not None else {}
            self._bar.footer = footer
            self._bar.update(self._task, completed=done, note=note, refresh=refresh, **changes)
        elif always or time.monotonic() - self._printed > HEARTBEAT:
            self._printed = time.monotonic()
            self._console.note(line)

    def image(self, image: Any) -> None:
        """Show a PIL image above the bar, in place of the last one."""
        self._bar.image = HalfBlocks(image)
        self._bar.refresh()

    def show(self, image: Any) -> None:
        """Print a renderable of rich, which stays on stderr."""
        if self._bar is not None:
            self._bar.image = None
            self._bar.refresh()  # else rich would draw the old one once more, below this
            self._bar.console.print(image)
        else:
            from rich.console import Console as RichConsole

            RichConsole(stderr=True).print(image)


def _rich_bar(sizes: bool, remaining: bool, auto_refresh: bool) -> Any:
    from rich import progress
    from rich.console import Console as RichConsole
    from rich.text import Text

    class Bar(progress.Progress):
        image: Any = None
        footer = ""

        def get_renderables(self) -> Iterable[Any]:
            yield from [self.image] if self.image is not None else []
            yield from super().get_renderables()
            yield from [Text(self.footer)] if self.footer else []

    count: list[Any] = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    return Bar(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *(count if sizes else [progress.MofNCompleteColumn()]),
        "{task.fields[note]}",
        *([progress.TimeRemainingColumn()] if remaining else []),
        console=RichConsole(stderr=True),
        transient=True,
        auto_refresh=auto_refresh,
        redirect_stdout=sys.stdout.isatty(),  # rich would print results on stderr, too, when stdout is a file or a pipe
    )


PHASES = {
    "wait": "waiting for the warm worker,",
    "load": "loading",
    "encode": "encoding",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
    "explain": "explaining",
}
REDRAW = 0.5
"""Seconds between two drawings of a bar with an image, each of which takes some ten milliseconds."""


class GenerationProgress(ProgressBar):
    """The phases and denoising steps of `sdcli generate`. With `images` there can be a preview above the bar."""

    def __init__(self, console: Console, *, images: bool = False) -> None:
        super().__init__(console, auto_refresh=not images)
        self._images, self._drawn, self._began = images, 0.0, 0.0

    def phase(self, phase: Phase) -> None:
        """A new phase begins."""
        self._began = time.monotonic()
        text = f"{PHASES[phase.name]} {phase.detail}".rstrip()
        line = f"{text}, {phase.steps} steps" if phase.steps else text
        self.start(text, phase.steps or None, line=line if phase.name in ("wait", "load", "denoise") else None)

    def step(self, progress: Progress) -> None:
        """A denoising step is done."""
        now, done = time.monotonic(), progress.index + 1
        rate = done / max(now - self._began, 1e-9)
        drawn = self._images and now - self._drawn > REDRAW
        self._drawn = now if drawn else self._drawn
        left = (progress.count - done) / rate
        line = f"step {done} of {progress.count}, {rate:.2f} it/s, {left:.0f} s left"
        self.update(done, progress.count, line=line, note=f"{rate:.2f} it/s", refresh=drawn)


def counted(items: Iterable[T], total: int, console: Console, *, doing: str = "reading images") -> Iterator[T]:
    """The items, with progress as they are consumed."""
    with ProgressBar(console) as bar:
        bar.start(doing, total)
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done, line=f"{doing}: {done:,} of {total:,}")
