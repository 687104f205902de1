"""WebDataset tar shards: listed by their members' headers, images read in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdcli.data.file_tree import unsupported
from sdcli.data.folder_listing import CAPTION_LIKE
from sdcli.data.kohya import MAX_REPEATS
from sdcli.data.records import (
    MAX_CAPTION_BYTES,
    DroppedItem,
    Item,
    Items,
    ListedImages,
    Remark,
    UnusableEntry,
    captioned_by_class,
    captions_of_file,
    captions_of_value,
    file_stamp,
    label_of_value,
    read_part,
)
from sdcli.data.tar import DamagedTar, Member, members_of
from sdcli.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from sdcli.io.json_files import parse_json
from sdcli.io.text import NotText, decode_text


@dataclass(frozen=True, eq=False)
class TarShards(ListedImages):
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


Groups = dict[str, dict[str, list[Member]]]
"""Key -> suffix -> members."""
CUT_SHORT = "is cut short because its shard is"


def open_shards(
    files: Sequence[Path],
    *,
    names: Sequence[str],
    source: str,
    caption_extension: str = ".txt",
    dropped: Sequence[DroppedItem] = (),
) -> TarShards:
    """List the images of tar shards in img2dataset's layout: `key.jpg`, `key.txt`, `key.json` with a `caption`,
    and with the `repeats` that `write_shards` notes.

    Only headers and captions are read. `names` are shown to people. A shard that is cut short or damaged
    is used up to there, and the rest is dropped.
    """
    items: list[Item] = []
    offsets: list[int] = []
    lengths: list[int] = []
    lost, remarks = list(dropped), []
    with ThreadPoolExecutor(max_workers=4) as pool:  # shards on network disks have high latency
        indexed = pool.map(lambda file, name: _index(file, name, caption_extension), files, names)
        for block, shard in enumerate(indexed):
            lost += shard.dropped
            remarks += shard.remarks
            for sample in shard.samples:
                items.append(Item(sample.name, sample.captions, sample.label, block, sample.repeats))
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
    repeats: int


@dataclass
class _Shard:
    samples: list[_Sample] = field(default_factory=list)
    dropped: list[DroppedItem] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Suffix -> members that are not read."""

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(DroppedItem(name, reason))


def _index(path: Path, name: str, caption_extension: str) -> _Shard:
    shard = _Shard()
    try:
        with open(path, "rb", buffering=0) as file:
            groups = _groups(file, name, shard)
            for key, members in groups.items():
                _add_sample(file, f"{name}:{key}", members, shard, caption_extension.lower())
    except OSError as error:
        return _Shard(dropped=[DroppedItem(name, f"cannot be read: {error.strerror or error}")])
    if not shard.samples and not shard.dropped:
        shard.drop(name, "holds no images")
    if any(sample.repeats > 1 for sample in shard.samples):
        text = "holds images that count several times in an epoch, as the repeats in their .json say"
        shard.remarks.append(Remark(name, text))
    for suffix, count in sorted(shard.unread.items()):
        shard.remarks.append(Remark(name, f"holds {count:,} members that are not read ({suffix})"))
    return shard


def _groups(file: IO[bytes], name: str, shard: _Shard) -> Groups:
    """Key -> suffix -> members; what cannot be read is noted in the shard."""
    size = os.fstat(file.fileno()).st_size
    groups: Groups = {}
    keys: dict[tuple[int, str], str] = {}  # joined archives may use a key again, for another sample
    try:
        for member in members_of(file):
            folder, _, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if base.startswith("._"):  # what macOS knows about a file
                continue
            if not stem or not dot:
                shard.unread["hidden" if not stem else "without a suffix"] += 1
                continue
            plain = f"{folder}/{stem}" if folder else stem
            key = plain
            if member.archive:
                again = f"{plain}@{member.archive + 1}" if plain in groups else plain
                key = keys.setdefault((member.archive, plain), again)
            if member.link:
                shard.drop(f"{name}:{member.name}", "is a link, which is not followed")
                continue
            if member.offset + member.size > size:
                groups.pop(key, None)
                shard.drop(f"{name}:{key}", CUT_SHORT)
                break
            groups.setdefault(key, {}).setdefault(f".{suffix.lower()}", []).append(member)
    except DamagedTar as damage:
        shard.drop(name, f"{damage}; {'what follows is lost' if groups else 'nothing of it is used'}")
        if not damage.ended:
            _drop_incomplete(groups, name, shard)
    return groups


def _drop_incomplete(groups: Groups, name: str, shard: _Shard) -> None:
    """Where a shard stops too soon, its last sample goes if it has less than the one before: its caption, for one."""
    if len(groups) > 1:
        (_, before), (key, last) = list(groups.items())[-2:]
        if set(last) < set(before):
            del groups[key]
            shard.dropped.append(DroppedItem(f"{name}:{key}", CUT_SHORT))


def _add_sample(
    file: IO[bytes], name: str, members: dict[str, list[Member]], shard: _Shard, caption_extension: str
) -> None:
    images = [member for suffix in members if suffix in IMAGE_SUFFIXES for member in members[suffix]]
    if not images:
        _drop_without_image(name, members, shard)
        return
    for other in images[1:]:
        shard.drop(f"{name}{other.name[other.name.rindex('.') :]}", "is a second image of its key")
    try:
        record = _record(file, members)
        captions: tuple[str, ...] = ()
        if caption_extension in members:
            member = members[caption_extension][0]
            captions = captions_of_file(_read(file, member), name=member.name)
            if not captions and not record.get("caption"):
                shard.remarks.append(Remark(name, "its caption is empty", loses=True))
        captions = captions or captions_of_value(record.get("caption"))
        label = label_of_value(record.get("label"))
        if label is None and ".cls" in members:
            label = label_of_value(_text(file, members[".cls"][0]).strip().partition("\n")[0])
        repeats = _repeats(record)
    except UnusableEntry as problem:
        shard.drop(name, str(problem))
        return
    shard.samples.append(_Sample(name, images[0], captions, label, repeats))
    _count_unread(name, members, shard, caption_extension, captioned=bool(captions))


def _drop_without_image(name: str, members: dict[str, list[Member]], shard: _Shard) -> None:
    dotted = [suffix for suffix in members if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    for suffix in dotted:
        key = name.rpartition(":")[2]
        for _ in members[suffix]:
            shard.drop(f"{name}{suffix}", f"has a dot in its name, so its key is {key!r}, as in WebDataset; rename it")
    if not dotted:
        unread = sorted(set(members) & UNREAD_SUFFIXES)
        shard.drop(name, unsupported(unread[0]) if unread else "is a sample without an image")


def _count_unread(
    name: str, members: dict[str, list[Member]], shard: _Shard, caption_extension: str, *, captioned: bool
) -> None:
    """Note the members of a sample that were not read."""
    if len(members) == 1:
        return
    for suffix, same in members.items():
        if suffix in IMAGE_SUFFIXES:
            continue
        if suffix in CAPTION_LIKE - {caption_extension} and not captioned:
            text = f"has no {caption_extension}, but a {suffix}, which --caption-extension {suffix} would read"
            shard.remarks.append(Remark(name, text, loses=True))
        elif suffix not in (caption_extension, ".json", ".cls"):
            shard.unread[suffix] += len(same)
        elif len(same) > 1:
            shard.remarks.append(Remark(name, f"has {len(same)} members {suffix}; only the first is read", loses=True))


def _record(file: IO[bytes], members: dict[str, list[Member]]) -> dict[str, Any]:
    if ".json" not in members:
        return {}
    text = _text(file, members[".json"][0])
    try:
        record = parse_json(text)
    except ValueError:
        raise UnusableEntry("its .json is damaged") from None
    if not isinstance(record, dict):
        raise UnusableEntry("its .json is not an object")
    return record


def _repeats(record: dict[str, Any]) -> int:
    """How often an image is sampled in an epoch, as `write_shards` notes it. Raises UnusableEntry."""
    repeats = record.get("repeats")
    if repeats is None:
        return 1
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not 1 <= repeats <= MAX_REPEATS:
        raise UnusableEntry(f"the repeats in its .json are not a whole number from 1 to {MAX_REPEATS:,}")
    return repeats


def _text(file: IO[bytes], member: Member) -> str:
    """The text of a member. Raises UnusableEntry."""
    try:
        return decode_text(_read(file, member))
    except NotText as problem:
        suffix = member.name[member.name.rindex(".") :]
        raise UnusableEntry(f"its {suffix} {problem.reason} ({member.name}, byte {problem.byte:,})") from None


def _read(file: IO[bytes], member: Member) -> bytes:
    if member.size > MAX_CAPTION_BYTES:
        raise UnusableEntry(
            f"its {member.name[member.name.rindex('.') :]} is larger than {MAX_CAPTION_BYTES // 1024**2} MiB"
        )
    file.seek(member.offset)
    return file.read(member.size)
