"""Input files: those of typed files and folders, in a stable order, and the bytes and digests of images."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeGuard, TypeVar

from sdcli.errors import BadImage, NotFound, UsageError
from sdcli.io.digests import digest_of
from sdcli.io.files import expanded, numbered
from sdcli.request.fields import FileRef, ImageBytes, ImageInput

MAX_FILE_BYTES = 512 * 1024 * 1024
"""The largest image file that is read."""
LATENT_SUFFIXES = frozenset({".safetensors", ".latent", ".npy"})


@dataclass(frozen=True)
class InputFile:
    """A file to work on. `name` is a relative path without suffix, and no other file of the run has the same."""

    path: Path
    name: PurePosixPath


def input_files(arguments: Sequence[Path], *, suffixes: frozenset[str], kind: str) -> Iterator[InputFile]:
    """The files that were typed, and those with a known suffix in the folders that were typed, sub-folders included.

    A folder is read when its turn comes, one sub-folder at a time and sorted. Of `a.png` and `a.jpg` side by side
    neither is called `a`: the names keep the suffix. A typed file need not exist; reading it raises the error.
    Raises NotFound for a folder that cannot be read or has no such file, before the first file; a sub-folder that
    cannot be read comes as if it were a file.
    """
    for argument in arguments:
        if argument.is_dir() and next(_in_folder(argument, suffixes), None) is None:
            raise NotFound(f"the folder {argument} holds no {kind} ({', '.join(sorted(suffixes))})")
    typed = Counter(_stem(path.name) for path in arguments if not path.is_dir())
    names = Names()
    for argument in arguments:
        if not argument.is_dir():
            yield InputFile(argument, names.claim(PurePosixPath(_name(argument.name, typed))))
            continue
        for path, relative in _in_folder(argument, suffixes):
            yield InputFile(path, names.claim(relative))


class Names:
    """Unique names; upper and lower case count as equal, as on macOS and Windows."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def claim(self, name: PurePosixPath) -> PurePosixPath:
        """The name, or where it is taken `name-2`, `name-3`, ..."""
        number, free = 1, name
        while str(free).casefold() in self._taken:
            number += 1
            free = PurePosixPath(str(numbered(name.with_name(f"{name.name}.x"), number))[: -len(".x")])
        self._taken.add(str(free).casefold())
        return free


def read_input(path: str) -> bytes:
    """The bytes of an image or latent file, or of stdin for `-`, which is read once.

    Raises NotFound, BadImage for what is not a regular file or is too large, and UsageError where stdin is a terminal.
    """
    if path == "-":
        return stdin_bytes()
    file = expanded(path)
    check_readable(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot read {path}: {error.strerror}") from None


def input_digest(path: str) -> str:
    """The SHA-256 of what `read_input` reads, 64 hex digits. Raises what that raises."""
    if path == "-":
        return hashlib.sha256(stdin_bytes()).hexdigest()
    file = expanded(path)
    check_readable(file)
    try:
        return digest_of(file)
    except OSError as error:
        raise BadImage(f"cannot read {path}: {error.strerror}") from None


Input = TypeVar("Input", bound=ImageInput)


def pinned(image: Input) -> Input:
    """An input with its digest: of a file's bytes as they are now.

    Raises what `input_digest` raises, and UsageError for another file than the reference's own digest says, and for
    an image of which only the digest is left.
    """
    if isinstance(image, ImageBytes):
        _held(image)
        return image
    digest = input_digest(image.path)
    check_same_file(digest, image.sha256, what=image.path)
    return image.model_copy(update={"sha256": digest})


def read_pinned(image: ImageInput) -> bytes:
    """The bytes of an input: those that it holds, or those of its file, or of stdin for `-`.

    Raises what `read_input` and `pinned` raise.
    """
    if isinstance(image, ImageBytes):
        return _held(image)
    data = read_input(image.path)
    check_same_file(hashlib.sha256(data).hexdigest(), image.sha256, what=image.path)
    return data


def _held(image: ImageBytes) -> bytes:
    if image.data is None:
        raise UsageError(f"{image} was not a file but bytes, which are not recorded; give it again as a file")
    if len(image.data) > MAX_FILE_BYTES:
        raise BadImage(f"{image} is larger than {MAX_FILE_BYTES // 1024**2} MiB, more than is read here")
    return image.data


def is_latents(image: ImageInput | None) -> TypeGuard[FileRef]:
    """Whether an init image is a file of latents, by its suffix."""
    return isinstance(image, FileRef) and Path(image.path).suffix.lower() in LATENT_SUFFIXES


def check_same_file(digest: str, recorded: str | None, *, what: str) -> None:
    """Raise UsageError where a record says that `what` was another file; digests are SHA-256 in hex."""
    if recorded not in (None, digest):
        raise UsageError(
            f"{what} is another file than the one that was generated with "
            f"(sha256 {digest[:12]}, recorded {str(recorded)[:12]})"
        )


@cache
def stdin_bytes() -> bytes:
    """All of stdin, the same bytes at every call. Raises UsageError for a terminal, and BadImage for too many."""
    if sys.stdin.isatty():
        raise UsageError("- reads an image from stdin, and nothing is piped in")
    data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"stdin holds more than {MAX_FILE_BYTES // 1024**2} MiB, which no image here is")
    if not data:
        raise BadImage("- reads an image from stdin, which is empty, or was read already as the prompts file")
    return data


def check_readable(path: Path) -> None:
    """Refuse what is not a regular file before it is opened: reading a pipe would block forever.

    Raises NotFound and BadImage.
    """
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if path.is_dir():
        raise BadImage(f"{path} is a folder, not a file")
    if not path.is_file():
        raise BadImage(f"{path} is not a regular file")
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{path} is larger than {MAX_FILE_BYTES // 1024**2} MiB, more than is read here")


def _in_folder(folder: Path, suffixes: frozenset[str]) -> Iterator[tuple[Path, PurePosixPath]]:
    unreadable: list[Path] = []

    def refused(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise NotFound(f"cannot read the folder {folder}: {error.strerror}")
        unreadable.append(Path(error.filename))

    for root, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or _is_companion(name)))
        files = [name for name in files if not (name.startswith(".") or _is_companion(Path(name).stem))]
        known = sorted(name for name in files if Path(name).suffix.lower() in suffixes)
        stems = Counter(_stem(name) for name in known)
        below = PurePosixPath(Path(root).relative_to(folder).as_posix())
        for name in known:
            yield Path(root, name), below / _name(name, stems)
    for path in unreadable:
        yield path, PurePosixPath(path.relative_to(folder).as_posix())


def _is_companion(stem: str) -> bool:
    """Whether a file or folder of that name, without its last suffix, is a trace or heatmap written beside an image."""
    return stem.endswith((".trace", ".heatmap"))


def _name(name: str, stems: Counter[str]) -> str:
    return name if stems[_stem(name)] > 1 else Path(name).stem


def _stem(name: str) -> str:
    return Path(name).stem.casefold()
