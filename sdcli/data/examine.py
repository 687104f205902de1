"""Looks at every image of a set once, before step 1: which can be used, which not and why; remembers what it saw."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdcli.data.latent_folders import LatentFiles
from sdcli.data.records import Dropped, ImageSet, Remark
from sdcli.errors import BadImage, BadLatents, CannotWrite, NotFound
from sdcli.images.image_files import image_from_bytes
from sdcli.io.files import write_whole
from sdcli.io.json_files import parse_json

SCHEMA = 1
"""To be raised when the same bytes may be judged otherwise than before: what was remembered is then not used."""
EXAMPLES = 3
"""How many images a line of the report names."""


@dataclass(frozen=True)
class Seen:
    """What one image turned out to be."""

    index: int
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, upright; (0, 0) where it cannot be used."""
    digest: str = ""
    """The SHA-256 of its bytes, in hexadecimal."""
    look: int = 0
    """Its difference hash; see `difference_hash`."""
    reason: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True, eq=False)
class Examination:
    """A set of images, every one of them looked at."""

    source: str
    used: np.ndarray
    """int64 [m]: the indices of the images that can be used, rising."""
    sizes: np.ndarray
    """int32 [n, 2]: width and height in pixels of every image, upright; 0 for those that are not used."""
    digests: tuple[str, ...]
    """[n] The SHA-256 of each image's bytes, in hexadecimal; empty for those that are not used."""
    looks: np.ndarray
    """uint64 [n]: difference hashes."""
    dropped: tuple[Dropped, ...]
    """What is not used: found while listing, or while looking."""
    uncaptioned: np.ndarray
    """int64: the indices of used images without a caption."""
    remarks: tuple[Remark, ...]
    smallest: str = ""
    """The name of the used image with the fewest pixels."""
    uncaptioned_examples: tuple[str, ...] = ()

    def report(self) -> list[str]:
        """Lines for people: how many are used and how many not, each reason with up to three examples."""
        total = len(self.used) + len(self.dropped)
        lines = [f"{self.source}: {len(self.used):,} of {total:,} are used, {len(self.dropped):,} dropped"]
        lines += [f"  dropped {line}" for line in _grouped((one.name, one.reason) for one in self.dropped)]
        if len(self.uncaptioned):
            lines.append(f"  {len(self.uncaptioned):,} without a caption: {_examples(self.uncaptioned_examples)}")
        lines += [f"  note {line}" for line in _grouped((one.name, one.text) for one in self.remarks)]
        if len(self.used):
            lines.append(f"  sizes {_sizes_line(self.sizes[self.used])}; the smallest is {self.smallest}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON; lists are complete."""
        sizes = self.sizes[self.used]
        return {
            "source": self.source,
            "used": len(self.used),
            "dropped": [{"name": one.name, "reason": one.reason} for one in self.dropped],
            "uncaptioned": len(self.uncaptioned),
            "uncaptioned_examples": list(self.uncaptioned_examples),
            "remarks": [{"name": one.name, "text": one.text, "loses": one.loses} for one in self.remarks],
            "smallest": self.smallest,
            "sizes": {
                "smallest": sizes[_areas(sizes).argmin()].tolist() if len(sizes) else None,
                "median": np.median(sizes, axis=0).astype(int).tolist() if len(sizes) else None,
                "largest": sizes[_areas(sizes).argmax()].tolist() if len(sizes) else None,
            },
        }


def look(images: ImageSet, *, memory: Path | None = None, workers: int | None = None) -> Iterator[Seen]:
    """Decode every image once, in threads, and yield what was seen, in order of the index; for a progress display.

    `memory` is a folder of the caller's, where what was seen is kept by name and by what changes with the bytes (size
    and time of change, place in the shard): a second run looks only at what is new. It is never in the user's data; if
    it cannot be written, the next run just takes as long as this one. `workers`: threads, by default one per CPU.
    Raises Offline where streamed images cannot be fetched.
    """
    remembered = _Memory.read(memory, images.source) if memory is not None else _Memory(None)
    count = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="examine")
    waiting: deque[Future[Seen]] = deque()
    complete = False
    try:
        for index in range(len(images)):
            waiting.append(pool.submit(_seen, images, index, remembered))
            if len(waiting) >= 4 * count:  # bounded, so that only a few images are held
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        complete = True
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        remembered.write(complete=complete)


def examination(images: ImageSet, seen: Iterable[Seen]) -> Examination:
    """Sum up what `look` saw of all images."""
    number = len(images)
    sizes, looks = np.zeros((number, 2), dtype=np.int32), np.zeros(number, dtype=np.uint64)
    digests, dropped = [""] * number, list(images.dropped)
    uncaptioned: list[int] = []
    examples: list[str] = []
    for one in seen:
        if one.reason:
            dropped.append(Dropped(images[one.index].name, one.reason))
            continue
        sizes[one.index], looks[one.index], digests[one.index] = one.size, one.look, one.digest
        item = images[one.index]
        if not item.captions:
            uncaptioned.append(one.index)
            examples += [item.name] if len(examples) < EXAMPLES else []
    used = np.flatnonzero(sizes[:, 0])
    smallest = images[int(used[_areas(sizes[used]).argmin()])].name if len(used) else ""
    return Examination(
        source=images.source,
        used=used.astype(np.int64),
        sizes=sizes,
        digests=tuple(digests),
        looks=looks,
        dropped=tuple(dropped),
        uncaptioned=np.array(uncaptioned, dtype=np.int64),
        remarks=images.remarks,
        smallest=smallest,
        uncaptioned_examples=tuple(examples),
    )


def difference_hash(image: Image.Image) -> int:
    """64 bits that say, for 8x8 places of an image, whether it gets darker to the right.

    Images that were only resized or compressed again differ in a few bits. (dHash, N. Krawetz, "Kind of Like That",
    hackerfactor.com 2013.)
    """
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big")


# Looking at one


def _seen(images: ImageSet, index: int, memory: _Memory) -> Seen:
    name = images[index].name
    try:
        key = f"{name}\n{images.stamp(index)}"
        known = memory.recall(key, index)
        if known is not None:
            return known
        data = images.read(index)
    except NotFound:
        return Seen(index, reason="is not there any more")
    except BadImage as error:
        return Seen(index, reason=_reason(str(error), name))
    seen = _look_at(images, index, data, name)
    memory.keep(key, seen)
    return seen


def _look_at(images: ImageSet, index: int, data: bytes, name: str) -> Seen:
    digest = hashlib.sha256(data).hexdigest()
    try:
        if isinstance(images, LatentFiles):
            images.read_latents(index)
            width, height = (int(side) for side in images.sizes[index])
            place = int(images.places[index])
            return Seen(index, (width, height), digest if place < 0 else f"{digest}:{place}")
        image = image_from_bytes(data, name=name)
    except (BadImage, BadLatents, NotFound) as error:
        return Seen(index, digest=digest, reason=_reason(str(error), name))
    except MemoryError:
        return Seen(index, digest=digest, reason="is too large for the memory that is there")
    return Seen(index, image.size, digest, difference_hash(image))


def _reason(sentence: str, name: str) -> str:
    """What follows the name in `folder/name: is cut short`, or in `folder/name is damaged`."""
    known = name if sentence.startswith(name) else name.rpartition("/")[2]
    _, found, reason = sentence.partition(known)
    return reason.removeprefix(":").strip() if found and reason.strip(": ") else sentence


# What was seen before


class _Memory:
    """What was seen of a source's images, by name and stamp; kept in one file of the memory folder."""

    def __init__(self, path: Path | None, known: dict[str, list[Any]] | None = None) -> None:
        self._path = path
        self._known = known or {}
        self._current: dict[str, list[Any]] = {}
        self._changed = False

    @classmethod
    def read(cls, folder: Path, source: str) -> _Memory:
        """What is remembered; nothing, where the file is absent, damaged or of another version."""
        identity = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()[:32]
        path = folder / f"examined-{identity}.json"
        try:
            content = parse_json(path.read_bytes())
            known = content["seen"] if content["schema"] == SCHEMA else {}
        except (OSError, ValueError, KeyError, TypeError):
            known = {}
        return cls(path, known if isinstance(known, dict) else {})

    def recall(self, key: str, index: int) -> Seen | None:
        entry = self._known.get(key)
        match entry:
            case [int(width), int(height), str(digest), int(look), str(reason)] if 0 <= look < 2**64:
                self._current[key] = entry
                return Seen(index, (width, height), digest, look, reason)
        return None

    def keep(self, key: str, seen: Seen) -> None:
        self._current[key] = [*seen.size, seen.digest, seen.look, seen.reason]
        self._changed = True

    def write(self, *, complete: bool) -> None:
        """Keep what is new; after a complete look, entries of images that are gone fall out."""
        if self._path is None or not self._changed:
            return
        seen = self._current if complete else self._known | self._current
        data = json.dumps({"schema": SCHEMA, "seen": seen}).encode()
        with contextlib.suppress(CannotWrite):
            write_whole(self._path, data, overwrite=True)


# How it reads


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`reason (3): a, b, c`, the most frequent first. Reasons that differ in numbers and names only are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in pairs:
        alike = re.sub(r"\d[\d,.]*|\([^)]*\)", "#", reason)
        groups.setdefault(alike, []).append((name, reason))
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    return [f"{len(group):,}: {group[0][1]}: {_examples([name for name, _ in group])}" for group in ordered]


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:EXAMPLES])
    return f"{shown}, ..." if len(names) > EXAMPLES else shown


def _sizes_line(sizes: np.ndarray) -> str:
    areas = _areas(sizes)
    least, most = sizes[areas.argmin()], sizes[areas.argmax()]
    if (sizes == sizes[0]).all():
        return f"{least[0]}x{least[1]}"
    middle = np.median(sizes, axis=0).astype(int)
    return f"{least[0]}x{least[1]} to {most[0]}x{most[1]}, median {middle[0]}x{middle[1]}"


def _areas(sizes: np.ndarray) -> np.ndarray:
    return sizes[:, 0].astype(np.int64) * sizes[:, 1]
