"""Latent previews during denoising, in a file or on the terminal, rarely enough to cost little time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.cli.ui.console import plain_terminal
from sdcli.errors import BadImage, CannotWrite, UsageError
from sdcli.io.files import check_folder, check_new, write_whole

if TYPE_CHECKING:
    from sdcli.generation.events import Progress

TERMINAL = "terminal"
SHARE = 0.05
"""Maximum share of the elapsed time that is spent on previews."""
EXPECTED = 0.05
"""Expected seconds of the first preview."""
WHAT = {"preview": True}
"""Metadata of a preview's file."""


class Throttle:
    """Limits an activity to at most `SHARE` of the elapsed time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._spent, self._last = 0.0, EXPECTED

    def due(self) -> bool:
        """Whether another run of the activity, as long as the last, stays within the share."""
        return self._spent + self._last <= SHARE * (self._clock() - self._began)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of the block."""
        began = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - began
            self._spent += self._last


class Preview:
    """Calls `show` with a PIL image of the x0 prediction after some steps, at least once in a complete run.

    If showing fails, `warn` gets a sentence, and there are no more previews. `detail` gets one about how the latents
    were decoded, and another where that changes.
    """

    def __init__(
        self,
        show: Callable[[Any], None],
        throttle: Throttle | None = None,
        *,
        warn: Callable[[str], None],
        detail: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._show, self._throttle, self._shown = show, throttle or Throttle(), False
        self._warn, self._detail, self._fails = warn, detail, False
        self._decoded: str | None = None

    def step(self, progress: Progress) -> None:
        """A denoising step is done."""
        last = progress.index + 1 == progress.count
        if not self._fails and (self._throttle.due() or (last and not self._shown)):
            with self._throttle.spending():
                image = progress.preview()
                if image is None:
                    return
                decoded = getattr(image, "info", {}).get("decoded")
                if decoded != self._decoded:
                    self._decoded = decoded
                    self._detail(f"previews are {decoded}")
                try:
                    self._show(image)
                    self._shown = True
                except CannotWrite as error:
                    self._fails = True
                    self._warn(f"no further previews: {error}")


def check_preview(target: str, *, overwrite: bool, quiet: bool) -> None:
    """Check the target of --preview. Raises UsageError, AlreadyExists and CannotWrite.

    A file that is itself a preview may be replaced without `overwrite`.
    """
    if target == TERMINAL:
        if quiet:
            raise UsageError("--preview terminal cannot be used with --quiet")
        check_terminal("--preview terminal")
        return
    path = Path(target)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--preview takes a .png file or {TERMINAL}, not {target!r}")
    check_folder(path.parent)
    if path.exists() and not _is_preview(path):
        check_new(path, overwrite=overwrite)


def check_terminal(option: str) -> None:
    """Raise UsageError unless stderr is a terminal with colours."""
    if plain_terminal():
        raise UsageError(f"{option} needs stderr to be a terminal with colours; --preview FILE.png works anywhere")


def to_file(path: Path) -> Callable[[Any], None]:
    """A function that writes an image to the path, replacing the whole file."""
    from sdcli.images.contact_sheet import sheet_bytes

    return lambda image: write_whole(path, sheet_bytes(image, WHAT), overwrite=True)


def _is_preview(path: Path) -> bool:
    import json

    from sdcli.images.contact_sheet import KEY
    from sdcli.images.image_files import open_safely

    try:
        with open_safely(path) as image:
            return image.info.get(KEY) == json.dumps(WHAT)
    except BadImage:
        return False
