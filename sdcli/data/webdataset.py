"""WebDataset tar shards: found by their members' headers alone, images read in place; and how shards are written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from sdcli.data.records import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    UNREAD_SUFFIXES,
    Dropped,
    ImageSet,
    Item,
    Items,
    Listed,
    Remark,
    Unusable,
    captioned_by_class,
    captions_of_file,
    captions_of_value,
    file_stamp,
    label_of_value,
    read_part,
)
from sdcli.errors import CannotWrite, UsageError
from sdcli.io.files import AlreadyExists, sync_folder, whole_file
from sdcli.io.json_files import parse_json
from sdcli.io.temporary_files import sweep, temporary_path

BLOCK = 512
MAX_NAME_BYTES = 64 * 1024
"""The largest extended header that is read."""
MAX_PATTERN = 1_000_000
"""The most paths that braces may stand for."""


@dataclass(frozen=True, eq=False)
class TarShards(Listed):
    """Images that are members of tar files; a block is a shard."""

    files: tuple[Path, ...] = field(kw_only=True)
    offsets: np.ndarray = field(kw_only=True)
    """int64 [n]: where each image begins in its shard."""
    lengths: np.ndarray = field(kw_only=True)
    """int64 [n]: bytes."""

    @property
    def streamed(self) -> bool:
        return True

    def read(self, index: int) -> bytes:
        """The image's bytes, read in place. Raises NotFound and BadImage."""
        item = self.items[index]
        return read_part(
            self.files[item.block], offset=int(self.offsets[index]), size=int(self.lengths[index]), name=item.name
        )

    def stamp(self, index: int) -> str:
        """The shard's size and time of change, and the place in it. Raises NotFound and BadImage."""
        shard = self.files[int(self.items.blocks[index])]
        return f"{file_stamp(shard)}:{self.offsets[index]}:{self.lengths[index]}"


@dataclass(frozen=True)
class Member:
    """An ordinary file in a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


Groups = dict[str, dict[str, list[Member]]]
"""Key -> suffix -> members."""
CUT_SHORT = "is cut short, as its shard is"


class DamagedTar(Exception):
    """The tar goes on in a way that cannot be read; what came before is sound."""


# Reading


def open_shards(
    files: Sequence[Path],
    *,
    names: Sequence[str],
    source: str,
    caption_extension: str = ".txt",
    dropped: Sequence[Dropped] = (),
) -> TarShards:
    """List the images of tar shards in img2dataset's layout: `key.jpg`, `key.txt`, `key.json` with a `caption`.

    Only headers and captions are read. `names` are what people call the shards. A shard that is cut short or damaged
    is used as far as it goes, and what is missing is dropped.
    """
    items: list[Item] = []
    offsets: list[int] = []
    lengths: list[int] = []
    lost, remarks = list(dropped), []
    with ThreadPoolExecutor(max_workers=4) as pool:  # a shard on a network disk answers slowly
        indexed = pool.map(lambda file, name: _index(file, name, caption_extension), files, names)
        for block, shard in enumerate(indexed):
            lost += shard.dropped
            remarks += shard.remarks
            for sample in shard.samples:
                items.append(Item(sample.name, sample.captions, sample.label, block))
                offsets.append(sample.image.offset)
                lengths.append(sample.image.size)
    return TarShards(
        source,
        Items.of(captioned_by_class(items)),
        dropped=tuple(lost),
        remarks=tuple(remarks),
        files=tuple(files),
        offsets=np.array(offsets, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
    )


@dataclass(frozen=True)
class _Sample:
    name: str
    image: Member
    captions: tuple[str, ...]
    label: str | None


@dataclass
class _Shard:
    samples: list[_Sample] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)


def _index(path: Path, name: str, caption_extension: str) -> _Shard:
    shard = _Shard()
    try:
        with open(path, "rb", buffering=0) as file:
            groups = _groups(file, name, shard)
            for key, members in groups.items():
                _add_sample(file, f"{name}:{key}", members, shard, caption_extension.lower())
    except OSError as error:
        return _Shard(dropped=[Dropped(name, f"cannot be read: {error.strerror or error}")])
    if not shard.samples and not shard.dropped:
        shard.dropped.append(Dropped(name, "holds no images"))
    return shard


def _groups(file: IO[bytes], name: str, shard: _Shard) -> Groups:
    """Key -> suffix -> members; what cannot be read is noted in the shard."""
    size = os.fstat(file.fileno()).st_size
    groups: Groups = {}
    try:
        for member in members_of(file):
            folder, _, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not stem or not dot:  # hidden, or without suffix: no part of a sample
                continue
            key = f"{folder}/{stem}" if folder else stem
            if member.offset + member.size > size:
                groups.pop(key, None)
                shard.dropped.append(Dropped(f"{name}:{key}", CUT_SHORT))
                break
            groups.setdefault(key, {}).setdefault(f".{suffix.lower()}", []).append(member)
    except DamagedTar as damage:
        shard.dropped.append(
            Dropped(name, f"{damage}; {'what follows is lost' if groups else 'nothing of it is used'}")
        )
        _drop_incomplete(groups, name, shard)
    return groups


def _drop_incomplete(groups: Groups, name: str, shard: _Shard) -> None:
    """Where a shard stops too soon, its last sample goes if it has less than the one before: its caption, for one."""
    if len(groups) > 1:
        (_, before), (key, last) = list(groups.items())[-2:]
        if set(last) < set(before):
            del groups[key]
            shard.dropped.append(Dropped(f"{name}:{key}", CUT_SHORT))


def _add_sample(
    file: IO[bytes], name: str, members: dict[str, list[Member]], shard: _Shard, caption_extension: str
) -> None:
    images = [member for suffix in members if suffix in IMAGE_SUFFIXES for member in members[suffix]]
    if not images:
        unread = sorted(set(members) & UNREAD_SUFFIXES)
        reason = f"is of a kind that is not read ({unread[0]})" if unread else "is a sample without an image"
        shard.dropped.append(Dropped(name, reason))
        return
    for other in images[1:]:
        shard.dropped.append(Dropped(f"{name}{other.name[other.name.rindex('.') :]}", "is a second image of its key"))
    try:
        record = _record(file, members)
        captions: tuple[str, ...] = ()
        if caption_extension in members:
            captions = captions_of_file(_read(file, members[caption_extension][0]))
            if not captions and not record.get("caption"):
                shard.remarks.append(Remark(name, "its caption is empty", loses=True))
        captions = captions or captions_of_value(record.get("caption"))
        label = label_of_value(record.get("label"))
        if label is None and ".cls" in members:
            label = next(iter(captions_of_file(_read(file, members[".cls"][0]))), None)
    except Unusable as problem:
        shard.dropped.append(Dropped(name, str(problem)))
        return
    shard.samples.append(_Sample(name, images[0], captions, label))


def _record(file: IO[bytes], members: dict[str, list[Member]]) -> dict[str, Any]:
    if ".json" not in members:
        return {}
    try:
        record = parse_json(_read(file, members[".json"][0]))
    except ValueError:
        raise Unusable("its .json is damaged") from None
    if not isinstance(record, dict):
        raise Unusable("its .json holds no object")
    return record


def _read(file: IO[bytes], member: Member) -> bytes:
    if member.size > MAX_CAPTION_BYTES:
        raise Unusable(
            f"its {member.name[member.name.rindex('.') :]} is larger than {MAX_CAPTION_BYTES // 1024**2} MiB"
        )
    file.seek(member.offset)
    return file.read(member.size)


def members_of(file: IO[bytes]) -> Iterator[Member]:
    """The ordinary files of an uncompressed tar, by its headers alone: 5 us each, where tarfile takes 20.

    USTAR, GNU (long names, sizes beyond 8 GiB) and pax headers are understood (POSIX.1-2017, `pax`). The last member
    may reach beyond the end of the file: the caller compares. Raises DamagedTar where no sound header follows, which
    tarfile takes for the end, and where the file ends without the end-of-archive mark.
    """
    size = os.fstat(file.fileno()).st_size
    offset = 0
    longer: dict[str, str] = {}
    while offset < size:
        file.seek(offset)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return  # the end-of-archive mark
        length, kind = _length_of(header, offset), header[156:157]
        offset += BLOCK
        if kind == b"L":
            longer["path"] = file.read(min(length, MAX_NAME_BYTES)).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            longer |= _pax_records(file.read(min(length, MAX_NAME_BYTES)))
        elif kind == b"S":
            raise DamagedTar(f"holds a sparse file at byte {offset - BLOCK:,}, which is not read")
        elif kind not in (b"g", b"K"):  # those speak of what follows, or of a link
            if longer.get("size", "").isdigit():
                length = int(longer["size"])
            if kind in (b"0", b"\0", b"7"):
                yield Member(longer.get("path") or _short_name(header), offset, length)
            elif kind in b"123456":  # links, devices and folders have no bytes, whatever their size says
                length = 0
            longer = {}
        offset += -(-length // BLOCK) * BLOCK
    raise DamagedTar("ends without the end-of-archive mark" if size else "is empty")


def _length_of(header: bytes, offset: int) -> int:
    """The bytes that follow a header. Raises DamagedTar for what is no header."""
    if offset == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"(\xb5/\xfd", b"\xfd7zXZ\0")):
        raise DamagedTar("is compressed; shards are read in place, so unpack it first (gunzip)")
    with contextlib.suppress(ValueError):
        if len(header) == BLOCK:
            checksum = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
            length = _number(header[124:136])
            if checksum == _number(header[148:156]):
                return length
    raise DamagedTar("is no tar file" if offset == 0 else f"is damaged or cut short at byte {offset:,}")


def _number(digits: bytes) -> int:
    """Octal digits, or GNU's big-endian binary for what they cannot hold. Raises ValueError."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.rstrip(b"\0 ").lstrip(b" ")
    return int(text, 8) if text else 0


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax_records(body: bytes) -> dict[str, str]:
    """`length key=value\\n` records."""
    records = {}
    while (match := re.match(rb"(\d{1,9}) ([^=]+)=", body)) is not None:
        length = int(match[1])
        value = body[match.end() : length - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        if length <= match.end():
            break
        body = body[length:]
    return records


# Patterns


def expand_braces(pattern: str) -> list[str]:
    """`{00..03}` -> 00 01 02 03, `{a,b}` -> a b, nested and several of them, as bash and WebDataset do.

    Raises UsageError for braces that are not closed, and for more than a million results.
    """
    depth, start = 0, pattern.find("{")
    if start < 0:
        return [pattern]
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 0:
            break
    else:
        raise UsageError(f"the brace in {pattern!r} is not closed")
    heads = _alternatives(pattern[start + 1 : end])
    tails = expand_braces(pattern[end + 1 :])
    if len(heads) * len(tails) > MAX_PATTERN:
        raise UsageError(f"{pattern!r} stands for more than {MAX_PATTERN:,} files")
    return [pattern[:start] + head + tail for head in heads for tail in tails]


def _alternatives(inside: str) -> list[str]:
    match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inside)
    if match is not None:
        first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1
        if abs(last - first) // step >= MAX_PATTERN:
            raise UsageError(f"{{{inside}}} stands for more than {MAX_PATTERN:,} files")
        padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-")[0] == "0" for end in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{number:0{width}d}" for number in numbers]
    parts, depth = [""], 0
    for letter in inside:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) == 1:  # `{x}` is no list: it stays as it is
        return [f"{{{one}}}" for one in expand_braces(inside)]
    return [one for part in parts for one in expand_braces(part)]


# Writing


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is whole on the disk, in the folder that will get its name when all are."""

    name: str
    images: int
    size: int


def write_shards(
    images: ImageSet,
    folder: Path,
    *,
    indices: Iterable[int],
    max_bytes: int = 500 * 1000**2,
    max_pictures: int = 10_000,
) -> Iterator[WrittenShard]:
    """Write images to `folder/00000.tar`, ... in the order of `indices`, and yield each shard when it is done.

    Equal images give equal bytes. The folder appears with all its shards, or not at all: it is written under another
    name and renamed at the end. A shard exceeds `max_bytes` only where a single image does.
    Raises AlreadyExists where the folder is there and not empty, CannotWrite, and what reading raises.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise AlreadyExists(f"{folder} exists already; shards go to a new folder")
    sweep(folder.parent)
    unfinished = temporary_path(folder.parent, f"{folder.name[:50]}-shards")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {unfinished}: {error.strerror}") from None
    try:
        samples = _samples(images, indices)
        pending = next(samples, None)
        number = 0
        while pending is not None:
            name, count = f"{number:05d}.tar", 0
            with (
                whole_file(unfinished / name, overwrite=False) as temporary,
                open(temporary, "xb") as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                room = max_bytes - 2 * BLOCK - tarfile.RECORDSIZE  # the end-of-archive mark and its padding
                while pending is not None and count < max_pictures:
                    need = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in pending)
                    if count and tar.offset + need > room:
                        break
                    for member, data in pending:
                        facts = tarfile.TarInfo(member)
                        facts.size, facts.mode = len(data), 0o644
                        tar.addfile(facts, io.BytesIO(data))
                    count += 1
                    pending = next(samples, None)
            yield WrittenShard(name, count, (unfinished / name).stat().st_size)
            number += 1
        try:
            os.rename(unfinished, folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise CannotWrite(f"cannot make the folder {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _samples(images: ImageSet, indices: Iterable[int]) -> Iterator[list[tuple[str, bytes]]]:
    """(member, bytes) of the image, its captions and its record, for one image after the other."""
    for number, index in enumerate(indices):
        item, data = images[index], images.read(index)
        key = f"{number:09d}"
        record: dict[str, str] = {"name": item.name}
        if item.captions:
            record["caption"] = item.captions[0]
        if item.label is not None:
            record["label"] = item.label
        sample = [(f"{key}{_suffix_of(data, item.name)}", data)]
        if item.captions:
            sample.append((f"{key}.txt", "".join(f"{caption}\n" for caption in item.captions).encode()))
        sample.append((f"{key}.json", json.dumps(record).encode()))  # ASCII, so that odd file names survive
        yield sample


_STARTS = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def _suffix_of(data: bytes, name: str) -> str:
    """The suffix that fits the bytes; else that of the name."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    for start, suffix in _STARTS.items():
        if data.startswith(start):
            return suffix
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in IMAGE_SUFFIXES else ".png"
