"""Image sets: the interface of every source of training images, an indexed list whose bytes are read on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from sdcli.errors import BadImage, NotFound
from sdcli.io.text import NotText, control_character, decode_text
from sdcli.request.input_files import MAX_FILE_BYTES, check_readable

MAX_CAPTION_BYTES = 1024**2

Kind = Literal["pictures", "latents"]


@dataclass(frozen=True)
class Item:
    """One image of a set, without its bytes."""

    name: str
    """Unique, and shown to people: a relative path, `00003.tar:000030042`, `train-00001.parquet:17`."""
    captions: tuple[str, ...]
    """Alternatives, each a single line that is not empty; () without captions."""
    label: str | None = None
    """The class name, if the source has classes."""
    block: int = 0
    """The number of its shard or row group; 0 for loose files."""
    repeats: int = 1
    """How often it is sampled in an epoch."""


@dataclass(frozen=True)
class DroppedItem:
    """An image or a whole file that is not used; `reason` is a predicate (`is a broken link`)."""

    name: str
    reason: str


@dataclass(frozen=True)
class Remark:
    """A peculiarity of an image that is used, perhaps a mistake in the data."""

    name: str
    text: str
    loses: bool = False
    """Whether a caption is lost because of it."""


class ImageSet(Protocol):
    """Captioned images of any source. It can be pickled, takes little memory, and holds no open files by itself."""

    @property
    def source(self) -> str:
        """DATA as given by the user."""

    @property
    def kind(self) -> Kind:
        """Images; or latents, which have `read_latents` as well (`latent_folders.LatentFiles`)."""

    @property
    def streamed(self) -> bool:
        """Whether blocks should be read mostly in order (shards); loose files may be read in any order."""

    @property
    def shuffle_window(self) -> int | None:
        """The size of a shuffle buffer with which each block is read about once; None: unlimited."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted; () if the source has no classes."""

    @property
    def dropped(self) -> tuple[DroppedItem, ...]:
        """Items that listing found unusable."""

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """Peculiarities that listing found."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...

    def read(self, index: int, /) -> bytes:
        """The bytes of the image's file. Raises BadImage and NotFound."""

    def stamp(self, index: int, /) -> str:
        """A string that changes when the bytes do, made without reading them. Raises BadImage and NotFound."""


class UnusableEntry(Exception):
    """A caption, label or path that cannot be used; the message is the `reason` of a `DroppedItem`."""


class Strings(Sequence[str]):
    """Strings packed into one block of bytes, with 8 bytes of overhead each.

    Forked worker processes share the block; they would copy as many Python strings.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]  # as file names need it
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Items:
    """Many items, packed; indexing makes single `Item` objects."""

    names: Strings
    captions: Strings
    """Each image's captions, joined by newlines, which no caption has."""
    labels: np.ndarray
    """int32 [n], places in `classes`; -1 for none."""
    blocks: np.ndarray
    """int32 [n]"""
    repeats: np.ndarray
    """int32 [n]"""
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, items: Sequence[Item], *, classes: Iterable[str] = ()) -> Self:
        """Pack items; `classes` may name more than occur."""
        known = tuple(sorted({*classes, *(item.label for item in items if item.label is not None)}))
        place = {name: number for number, name in enumerate(known)}
        return cls(
            names=Strings(item.name for item in items),
            captions=Strings("\n".join(item.captions) for item in items),
            labels=np.array([-1 if item.label is None else place[item.label] for item in items], dtype=np.int32),
            blocks=np.array([item.block for item in items], dtype=np.int32),
            repeats=np.array([item.repeats for item in items], dtype=np.int32),
            classes=known,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no item {index}; there are {len(self)}")
        index %= len(self)
        captions, label = self.captions[index], int(self.labels[index])
        return Item(
            name=self.names[index],
            captions=tuple(captions.split("\n")) if captions else (),
            label=None if label < 0 else self.classes[label],
            block=int(self.blocks[index]),
            repeats=int(self.repeats[index]),
        )


@dataclass(frozen=True, eq=False)
class ListedImages:
    """The base of all sources: the packed items, and what listing found."""

    source: str
    items: Items
    dropped: tuple[DroppedItem, ...] = field(default=(), kw_only=True)
    remarks: tuple[Remark, ...] = field(default=(), kw_only=True)

    @property
    def kind(self) -> Kind:
        return "pictures"

    @property
    def streamed(self) -> bool:
        return False

    @property
    def shuffle_window(self) -> int | None:
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.items.classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return (self.items[index] for index in range(len(self)))


# Captions


def one_line(text: str) -> str:
    """A caption on one line, without surrounding space or a byte-order mark.

    Raises UnusableEntry for what is not Unicode, and for control characters, of which no tokenizer accepts NUL.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = len(text[: error.start].encode("utf-8", "surrogatepass"))
        raise UnusableEntry(f"its caption is not UTF-8 text (byte {before:,})") from None
    control = control_character(text)
    if control is not None:
        raise UnusableEntry(f"its caption {control[0]} (byte {len(text[: control[1]].encode()):,})")
    return re.sub(r"\s*[\r\n]\s*", " ", re.sub(r"^[\s\ufeff]+|\s+$", "", text))


def text_of_file(data: bytes, *, name: str) -> str:
    """The text in the bytes of a caption file (`name`), decoded by `io.text.decode_text`. Raises UnusableEntry."""
    if len(data) > MAX_CAPTION_BYTES:
        raise UnusableEntry(f"its caption is larger than {MAX_CAPTION_BYTES // 1024**2} MiB ({name})")
    try:
        return decode_text(data)
    except NotText as problem:
        raise UnusableEntry(f"its caption {problem.reason} ({name}, byte {problem.byte:,}); save it as UTF-8") from None


def captions_of_file(data: bytes, *, name: str) -> tuple[str, ...]:
    """The captions in the bytes of a caption file: one a line, blank lines skipped. Raises UnusableEntry."""
    return without_repeats(one_line(line) for line in re.split(r"\r\n|\r|\n", text_of_file(data, name=name)))


def captions_of_value(value: Any) -> tuple[str, ...]:
    """The captions in a cell of a table: a text or its bytes, a list of such alternatives, or nothing.

    Raises UnusableEntry.
    """
    values = [] if value is None else [value] if isinstance(value, str | bytes) else value
    if not isinstance(values, list | tuple) or not all(isinstance(text, str | bytes) for text in values):
        raise UnusableEntry("its caption is neither a text nor a list of texts")
    try:
        return without_repeats(one_line(decode_text(text) if isinstance(text, bytes) else text) for text in values)
    except NotText as problem:
        raise UnusableEntry(f"its caption {problem}") from None


def label_of_value(value: Any) -> str | None:
    """The class name in a cell of a table: a text or a whole number. Raises UnusableEntry."""
    if value is None or value == "":
        return None
    if isinstance(value, bool | bytes) or not isinstance(value, str | int):
        raise UnusableEntry("its label is neither a text nor a whole number")
    try:
        return one_line(str(value)) or None
    except UnusableEntry:
        raise UnusableEntry("its label is not UTF-8 text, or holds a control character") from None


def without_repeats(captions: Iterable[str]) -> tuple[str, ...]:
    """The captions in order, without repeats and empty ones."""
    return tuple(dict.fromkeys(caption for caption in captions if caption))


def captioned_by_class(items: Sequence[Item]) -> list[Item]:
    """Items with the class name as caption, if there are classes and no captions at all; else unchanged."""
    if any(item.captions for item in items):
        return list(items)
    return [replace(item, captions=(item.label,) if item.label else ()) for item in items]


# Files


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises NotFound and BadImage."""
    check_readable(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as error:
        raise BadImage(f"cannot read {path}: {error.strerror or error}") from None


def read_part(path: Path, *, offset: int, size: int, name: str) -> bytes:
    """`size` bytes at `offset` of a file. Raises NotFound and BadImage, whose sentences begin with `name`."""
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{name}: is larger than {MAX_FILE_BYTES // 1024**2} MiB, the limit for images")
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = bytearray()
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
    except FileNotFoundError:
        raise NotFound(f"{name}: no file {path}") from None
    except OSError as error:
        raise BadImage(f"{name}: cannot read {path}: {error.strerror or error}") from None
    if len(data) < size:
        raise BadImage(f"{name}: is cut short; {path} has become smaller")
    return bytes(data)


def file_stamp(path: Path) -> str:
    """A file's size and times of change. Raises NotFound and BadImage."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no file {path}") from None
    except OSError as error:
        raise BadImage(f"cannot read {path}: {error.strerror or error}") from None
    return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
