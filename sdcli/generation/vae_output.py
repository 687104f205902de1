"""Names and folders of the files that encoding and decoding write, and the failures that concern one file alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from sdcli.errors import BadImage, BadLatents, BadOutput, NotFound, OutOfMemory, UsageError
from sdcli.io.files import AlreadyExists, check_folder
from sdcli.io.temporary_files import sweep
from sdcli.request.input_files import InputFile

MAX_NAME_BYTES = 255
"""What file systems take as a name; an image may have one so long that no longer suffix fits behind it."""
OF_ONE_FILE = (BadImage, BadLatents, BadOutput, NotFound, OutOfMemory, UsageError, AlreadyExists)
"""Failures that concern one file; the others continue."""

Status = Literal["done", "skipped", "failed"]


def check_output(outdir: Path, output: Path | None) -> None:
    """Raise CannotWrite now for what would fail after the model is loaded."""
    check_folder(output.parent if output is not None else outdir)


def file_name(name: PurePosixPath, suffix: str) -> PurePosixPath:
    """The name with its suffix; one too long is cut, and gets a digest of the whole, so that names stay different."""
    whole = os.fsencode(name.name)
    if len(whole) + len(suffix) <= MAX_NAME_BYTES:
        return name.with_name(name.name + suffix)
    end = f"-{hashlib.sha256(whole).hexdigest()[:12]}{suffix}"
    return name.with_name(whole[: MAX_NAME_BYTES - len(end)].decode(errors="ignore") + end)


def swept(files: Iterable[InputFile], outdir: Path, output: Path | None) -> Iterator[InputFile]:
    """The same files; on the way temporary files of killed runs are removed from the folders that are written to."""
    seen: set[Path] = set()
    for file in files:
        folder = output.parent if output is not None else outdir / file.name.parent
        if folder not in seen:
            seen.add(folder)
            with contextlib.suppress(OSError):
                sweep(folder)
        yield file
